"""A handle on one generation of one session."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore_client.answers import FINEST, Attention, Precision, Scores, Sketches, TopK
from kvstore_client.appending import Appender
from kvstore_client.errors import Aborted
from kvstore_client.fetching import fetch_sketches, fetch_vectors
from kvstore_client.frames import Layers, block_of
from kvstore_client.info import SessionInfo, session_from
from kvstore_client.link import TIMEOUT_SECONDS, Link
from kvstore_client.prefix import Prefix
from kvstore_client.rpcs import DELETE_SESSION, FORK_SESSION, GET_SESSION, PREFETCH, UPDATE_SESSION
from kvstore_client.token_chain import TokenChain
from kvstore_codecs.spec import ModelShape
from kvstore_proto.v1 import kvstore_pb2 as pb

APPEND_TIMEOUT_SECONDS = 120.0


class Session:
    """One session, to append to and to query. Every call raises a KVStoreError if it fails.

    Queries name the length this handle knows (`length`: what was there at opening, then what its own appends reached),
    so they see everything below it at any replica. `refresh` adopts what others have appended since.
    """

    def __init__(self, link: Link, info: SessionInfo) -> None:
        self._link, self._info = link, info
        self._appender = Appender(link, info)

    @property
    def name(self) -> str:
        return self._info.name

    @property
    def generation(self) -> str:
        """Another one means that the name was deleted and created again; this handle then answers Aborted."""
        return self._info.generation

    @property
    def shape(self) -> ModelShape:
        return self._info.shape

    @property
    def length(self) -> int:
        """Tokens known to be durable."""
        return self._appender.length

    async def append(
        self,
        k: Layers,
        v: Layers,
        *,
        start: int | None = None,
        encode: bool = False,
        chain: TokenChain | None = None,
        timeout: float = APPEND_TIMEOUT_SECONDS,
    ) -> int:
        """Extends the session by keys and values of the same tokens; returns the length reached, which is durable.

        `k`, `v`: [layers, tokens, kv_heads, d] or one [tokens, kv_heads, d] for each layer, in the session's dtype,
        unchanged until this returns. More than the server takes at once is cut into several atomic appends, `timeout`
        seconds each. With `encode` the sketches are made here once the session is fitted; vectors are sent before.

        `start` is the position of the first token; None is `length`. After an error `length` says what is there, and
        the same call with the same explicit `start` settles an unknown outcome: what is there already and equal
        counts as done. Raises AlreadyExists if other tokens are there, OutOfRange if tokens before `start` are missing.

        `chain` names the session's token ids from position 0 on, so that `match_prefix` finds them.
        """
        return await self._appender.append(block_of(k, v, self.shape), start, encode, chain, timeout)

    def pin(self, end: int | None = None) -> Prefix:
        """The prefix [0, end) for all layers of a decode step; None is `length`."""
        return Prefix(self._link, self._info, self.length if end is None else end)

    async def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        end: int | None = None,
        head_offset: int = 0,
        precision: Precision = FINEST,
        debias: float | None = None,
        refine: int = 0,
        timeout: float = TIMEOUT_SECONDS,
    ) -> tuple[Tensor, Tensor]:
        """Attention over [0, end): see Prefix.attend. Layers of one decode step share a `pin`."""
        return await self.pin(end).attend(
            layer, q, head_offset=head_offset, precision=precision, debias=debias, refine=refine, timeout=timeout
        )

    async def attention(
        self,
        layer: int,
        q: Tensor,
        *,
        end: int | None = None,
        head_offset: int = 0,
        precision: Precision = FINEST,
        debias: float | None = None,
        refine: int = 0,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Attention:
        """As `attend`, with what the answer was computed from."""
        return await self.pin(end).attention(
            layer, q, head_offset=head_offset, precision=precision, debias=debias, refine=refine, timeout=timeout
        )

    async def score(
        self,
        layer: int,
        q: Tensor,
        *,
        start: int = 0,
        end: int | None = None,
        head_offset: int = 0,
        precision: Precision = FINEST,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Scores:
        """Logits of positions [start, end)."""
        return await self.pin(end).score(
            layer, q, start=start, head_offset=head_offset, precision=precision, timeout=timeout
        )

    async def topk(
        self,
        layer: int,
        q: Tensor,
        k: int,
        *,
        end: int | None = None,
        oversampling: float | None = None,
        head_offset: int = 0,
        precision: Precision = FINEST,
        timeout: float = TIMEOUT_SECONDS,
    ) -> TopK:
        """The k best positions below `end`: see Prefix.topk."""
        return await self.pin(end).topk(
            layer, q, k, oversampling=oversampling, head_offset=head_offset, precision=precision, timeout=timeout
        )

    async def fetch(
        self,
        *,
        layers: Sequence[int] | None = None,
        start: int = 0,
        end: int | None = None,
        dtype: torch.dtype | None = None,
        precision: Precision = FINEST,
        timeout: float = APPEND_TIMEOUT_SECONDS,
    ) -> tuple[Tensor, Tensor]:
        """Decoded keys and values [layers, end - start, kv_heads, d] in `dtype`, or the session's; None: all layers."""
        chosen, last = self._range(layers, end)
        return await fetch_vectors(
            self._link,
            self._info,
            layers=chosen,
            start=start,
            end=last,
            dtype=dtype,
            precision=precision,
            timeout=timeout,
        )

    async def fetch_sketches(
        self,
        *,
        layers: Sequence[int] | None = None,
        start: int = 0,
        end: int | None = None,
        timeout: float = APPEND_TIMEOUT_SECONDS,
    ) -> Sketches:
        """The stored rows as they are, packed, with the fit: for the same operations on this machine's own device."""
        chosen, last = self._range(layers, end)
        return await fetch_sketches(self._link, self._info, layers=chosen, start=start, end=last, timeout=timeout)

    async def fork(
        self,
        name: str,
        *,
        end: int | None = None,
        ttl_seconds: float | None = None,
        pinned: bool = False,
        timeout: float = TIMEOUT_SECONDS,
    ) -> "Session":
        """A new session that shares [0, end) of this one and goes its own way from there; None is `length`."""
        request = pb.ForkSessionRequest(
            source=self.name,
            source_generation=self.generation,
            end=self.length if end is None else end,
            name=name,
            ttl_seconds=ttl_seconds,
            pinned=pinned,
        )
        reply = await self._link.unary(FORK_SESSION, request, timeout=timeout, affinity=self._info.affinity)
        return Session(self._link, session_from(reply.session))

    async def update(
        self,
        *,
        ttl_seconds: float | None = None,
        clear_ttl: bool = False,
        pinned: bool | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> SessionInfo:
        """Changes what is given; `clear_ttl` lets the session live for ever."""
        request = pb.UpdateSessionRequest(
            name=self.name, generation=self.generation, ttl_seconds=ttl_seconds, clear_ttl=clear_ttl, pinned=pinned
        )
        reply = await self._link.unary(UPDATE_SESSION, request, timeout=timeout, affinity=self._info.affinity)
        return session_from(reply.session)

    async def delete(self, *, timeout: float = TIMEOUT_SECONDS) -> bool:
        """Deletes this generation; False if it was gone already. Forks keep what they share."""
        request = pb.DeleteSessionRequest(name=self.name, generation=self.generation)
        reply = await self._link.unary(DELETE_SESSION, request, timeout=timeout, affinity=self._info.affinity)
        return reply.deleted

    async def info(self, *, timeout: float = TIMEOUT_SECONDS) -> SessionInfo:
        """The session as the server sees it now. Aborted if the name belongs to another generation."""
        request = pb.GetSessionRequest(name=self.name)
        reply = await self._link.unary(GET_SESSION, request, timeout=timeout, affinity=self._info.affinity)
        info = session_from(reply.session)
        if info.generation != self.generation:
            raise Aborted(f"session {self.name} was deleted and created again", reason="GENERATION_CHANGED")
        return info

    async def refresh(self, *, timeout: float = TIMEOUT_SECONDS) -> int:
        """Adopts the server's length: queries see what others have appended, and the next append starts there."""
        self._appender.length = (await self.info(timeout=timeout)).length
        return self.length

    async def prefetch(
        self, *, end: int | None = None, precision: Precision = FINEST, timeout: float = TIMEOUT_SECONDS
    ) -> int:
        """Loads [0, end) before the first query; returns its bytes on the device."""
        request = pb.PrefetchRequest(
            session=self.name,
            generation=self.generation,
            end=self.length if end is None else end,
            precision=precision.to_proto(),
        )
        reply = await self._link.unary(PREFETCH, request, timeout=timeout, affinity=self._info.affinity)
        return reply.resident_bytes

    def _range(self, layers: Sequence[int] | None, end: int | None) -> tuple[Sequence[int], int]:
        return range(self.shape.layers) if layers is None else layers, self.length if end is None else end
