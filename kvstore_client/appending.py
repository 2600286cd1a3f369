"""Appending a block of any size: cut into atomic pieces, sent in order, resumed where the server stands."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore_client.errors import AlreadyExists, FailedPrecondition, OutOfRange, invalid
from kvstore_client.frames import Block, raw_frames
from kvstore_client.info import SessionInfo, session_from
from kvstore_client.link import Link
from kvstore_client.rpcs import APPEND, GET_SESSION
from kvstore_client.token_chain import TokenChain
from kvstore_client.wire import Frame
from kvstore_proto.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore_client.sketching import Sketcher

RESUMES_MAX = 8
"""How often one append may be sent back to an earlier length; a server that keeps doing so is broken."""

PIECES_AHEAD, ENCODED_AHEAD = 2, 3
"""Pieces under way besides the one that is awaited, of vectors and of sketches: while it is committed, the next are
written ahead by the server, on the wire, and encoded."""


@dataclass(frozen=True)
class Way:
    """How an append is sent."""

    piece_tokens: int
    encode: bool
    chain: TokenChain | None
    timeout: float
    ahead: bool = True
    """Before the pieces that it follows are acknowledged."""


class Turn:
    """On the wire: frames go out after those of the piece before, so that pieces arrive whole in their order."""

    def __init__(self, after: asyncio.Event) -> None:
        self.after, self.sent = after, asyncio.Event()


class Appender:
    """Appends of one session, one at a time."""

    def __init__(self, link: Link, info: SessionInfo) -> None:
        self._link, self._info = link, info
        self._lock, self._encoding = asyncio.Lock(), asyncio.Lock()
        self._sketcher: Sketcher | None = None
        self._encodes = True
        self.length = info.length
        """What the server has acknowledged to this handle."""

    async def append(
        self, block: Block, start: int | None, encode: bool, chain: TokenChain | None, timeout: float
    ) -> int:
        """See Session.append."""
        way = Way(await self._piece_tokens(timeout), encode, chain, timeout)
        async with self._lock:
            first = position = self.length if start is None else start
            resumes = 0
            while position < first + block.tokens:
                begun = position
                try:
                    async with aclosing(self._sent(block, first, position, way)) as ends:
                        async for position in ends:
                            self.length = max(self.length, position)
                except OutOfRange as error:
                    if way.ahead and position > begun:  # sent ahead to a server that does not know of the one before
                        way = replace(way, ahead=False)
                        continue
                    resumes += 1
                    if error.length is None or not first <= error.length < position or resumes > RESUMES_MAX:
                        raise
                    position = error.length
            return self.length

    async def _sent(self, block: Block, first: int, position: int, way: "Way") -> AsyncGenerator[int]:
        """Sends what of `block` lies from `position` on; yields where each piece ends once it is durable, in order."""
        under_way, last = deque[tuple[int, asyncio.Task[None]]](), first + block.tokens
        before = asyncio.Event()
        before.set()
        try:
            while under_way or position < last:
                if position >= last or len(under_way) > await self._ahead(way, first=not under_way):
                    end, oldest = under_way.popleft()
                    await oldest
                    yield end
                    continue
                piece = block.slice(position - first, position - first + way.piece_tokens)
                turn = Turn(before)
                under_way.append((position + piece.tokens, asyncio.create_task(self._send(piece, position, way, turn))))
                position, before = position + piece.tokens, turn.sent
        finally:
            for _, task in under_way:
                task.cancel()
            await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)

    async def _ahead(self, way: "Way", *, first: bool) -> int:
        """Pieces; none while it is not known yet whether the next piece will be encoded."""
        if way.encode and first:
            await self._ready_sketcher(way.timeout)
        if not way.ahead or (way.encode and self._encodes and self._sketcher is None):
            return 0
        return ENCODED_AHEAD if way.encode and self._encodes else PIECES_AHEAD

    async def _piece_tokens(self, timeout: float) -> int:
        """Tokens of one atomic append; the same for every append, so that a repeated one is cut the same way."""
        server = await self._link.server(timeout)
        token_bytes, bytes_max = self._info.shape.raw_bytes_per_token, server.limit("append_bytes_max")
        if token_bytes > bytes_max:
            raise invalid("k", f"one token takes {token_bytes} bytes, more than append_bytes_max", limit=bytes_max)
        return min(server.limit("append_tokens_max"), bytes_max // token_bytes)

    async def _send(self, piece: Block, start: int, way: "Way", turn: "Turn") -> None:
        """One atomic append.

        Sketches that are not what is stored are compared as vectors too: that is how an append made before the fit, or
        by a writer that does not encode, is recognised.
        """
        try:
            sketcher = await self._ready_sketcher(way.timeout) if way.encode else None
            if sketcher is not None and sketcher.begins_epoch(start, piece.tokens):
                self._sketcher = sketcher = None
            if sketcher is not None:
                async with self._encoding:
                    frames = await asyncio.to_thread(sketcher.encode, piece, start)
                header = self._header(piece, start, sum(frame.data.nbytes for frame in frames), way.chain)
                header.encoding, header.fit_fingerprint = pb.ENCODING_SKETCH, sketcher.plan.fingerprint
                try:
                    await self._upload(header, frames, way.timeout, turn)
                except FailedPrecondition:
                    self._sketcher = None
                except AlreadyExists:
                    pass
                else:
                    return
            header = self._header(piece, start, piece.tokens * self._info.shape.raw_bytes_per_token, way.chain)
            header.encoding = pb.ENCODING_RAW
            await self._upload(header, piece, way.timeout, turn)
        finally:
            turn.sent.set()

    async def _ready_sketcher(self, timeout: float) -> "Sketcher | None":
        """None before the session is fitted, and for good where this machine cannot encode as the server does."""
        spec = self._info.codec
        fit_length = spec.sink_tokens + spec.fit_tokens if spec.needs_fit else 0
        if self._sketcher is None and self._encodes and (self._info.fitted or self.length >= fit_length):
            request = pb.GetSessionRequest(name=self._info.name)
            reply = await self._link.unary(GET_SESSION, request, timeout=timeout, affinity=self._info.affinity)
            info = session_from(reply.session)
            if info.fitted and info.generation == self._info.generation:
                from kvstore_client.sketching import sketcher_for

                self._sketcher = await sketcher_for(self._link, info, timeout)
                self._encodes = self._sketcher is not None
        return self._sketcher

    def _header(self, piece: Block, start: int, size: int, chain: TokenChain | None) -> pb.AppendHeader:
        info = self._info
        return pb.AppendHeader(
            session=info.name,
            generation=info.generation,
            start=start,
            tokens=piece.tokens,
            bytes=size,
            block_hashes=chain.between(start, start + piece.tokens) if chain else (),
            block_tokens=chain.block_tokens if chain else 0,
        )

    async def _upload(self, header: pb.AppendHeader, body: Block | list[Frame], timeout: float, turn: "Turn") -> None:
        def requests() -> Iterator[pb.AppendHeader | Frame]:
            yield header
            yield from raw_frames(body) if isinstance(body, Block) else body
            turn.sent.set()

        await turn.after.wait()
        await self._link.upload(APPEND, requests, timeout=timeout, affinity=self._info.affinity)
