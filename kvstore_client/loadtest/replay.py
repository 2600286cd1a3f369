"""A trace's requests as a worker of an engine makes them: match a prefix, append what is missing, then decode."""

import asyncio
from collections.abc import Iterator

import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient, Session, TokenChain
from kvstore_client.errors import KVStoreError
from kvstore_client.loadtest.checking import is_what_was_sent
from kvstore_client.loadtest.tally import Done, Tally
from kvstore_client.loadtest.trace import TraceRequest
from kvstore_client.loadtest.vectors import Vectors
from kvstore_codecs.spec import CodecSpec, ModelShape

CHECK_EVERY = 8
"""Of the prompts: their last block is read back when they are done."""


class Replay:
    """Requests of one process, over its clients in turn.

    A request counts as `prompt`, from when it was due until the first decode step over its whole prompt is answered.
    Later steps each follow the one before, as tokens do, and count as `step`; a step attends to one layer.
    """

    def __init__(
        self,
        clients: list[AsyncKVStoreClient],
        name: str,
        shape: ModelShape,
        spec: CodecSpec | None,
        vectors: Vectors,
        *,
        block_tokens: int,
        rows: Tensor,
        ttl_seconds: float,
        timeout: float,
        tally: Tally,
    ) -> None:
        self._clients, self._name, self._shape, self._spec, self._vectors = clients, name, shape, spec, vectors
        self._block_tokens, self._rows, self._tally = block_tokens, rows, tally
        self._ttl, self._timeout = ttl_seconds, timeout
        self.decoding: set[asyncio.Task[None]] = set()

    async def prompt(self, request: TraceRequest, number: int, due: float) -> Done:
        """Answers the first step; the others go on as a task in `decoding`."""
        session, sent = await self._session_of(number, request)
        done = await self._step(session, request, 0)
        self._tally.facts["prompt_tokens"] += request.tokens
        self._tally.facts["matched_tokens"] += request.tokens - sent
        task = asyncio.create_task(self._decode(session, request, number, due))
        self.decoding.add(task)
        task.add_done_callback(self.decoding.discard)
        return Done(done.wire_bytes + sent * self._shape.raw_bytes_per_token, done.raw_bytes)

    async def _session_of(self, number: int, request: TraceRequest) -> tuple[Session, int]:
        """A session that holds the prompt, and how many of its tokens had to be appended."""
        client = self._clients[number % len(self._clients)]
        chain = TokenChain.of(self._token_ids(request), block_tokens=self._block_tokens)
        name = f"{self._name}-{number}"
        found = await client.match_prefix(self._shape.model_fingerprint, chain, timeout=self._timeout)
        held = 0 if found is None else min(found.end, request.tokens)
        if found is None:
            session = await client.create_session(
                name, self._shape, self._spec, ttl_seconds=self._ttl, timeout=self._timeout
            )
        else:
            session = await client.open_session(found.session, timeout=self._timeout)
            if held < request.tokens:
                session = await session.fork(name, end=held, ttl_seconds=self._ttl, timeout=self._timeout)
        if held < request.tokens:
            k, v = self._missing(request, held)
            await session.append(k, v, start=held, chain=chain, timeout=self._timeout)
        return session, request.tokens - held

    async def _decode(self, session: Session, request: TraceRequest, number: int, due: float) -> None:
        loop = asyncio.get_running_loop()
        at = request.due
        try:
            for step in range(1, request.steps):
                begun = loop.time()
                at = request.due + begun - due
                done = await self._step(session, request, step)
                self._tally.answered("step", at, loop.time() - begun, done)
            if number % CHECK_EVERY == 0:
                self._tally.check(await self._is_there(session, request))
        except KVStoreError as error:
            self._tally.failed("step", at, error.code)

    async def _step(self, session: Session, request: TraceRequest, step: int) -> Done:
        q = self._rows[step % len(self._rows)][None]
        out, lse = await session.attend(step % self._shape.layers, q, end=request.tokens, timeout=self._timeout)
        read = request.tokens * self._shape.raw_bytes_per_token // self._shape.layers
        return Done(q.nbytes + out.nbytes + lse.nbytes, read)

    async def _is_there(self, session: Session, request: TraceRequest) -> bool:
        """The prompt's last block is what was sent, by this request or by those before."""
        number = (request.tokens - 1) // self._block_tokens
        start, layer = number * self._block_tokens, self._shape.layers - 1
        keys, values = await session.fetch(layers=[layer], start=start, end=request.tokens, dtype=torch.float32)
        return is_what_was_sent(self._vectors, layer, request.blocks[number] * self._block_tokens, keys, values)

    def _missing(self, request: TraceRequest, held: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, tokens - held, H, D]: block b holds the pool's rows from b x block_tokens on."""
        size, pieces = self._block_tokens, list[tuple[Tensor, Tensor]]()
        for start in range(held, request.tokens, size):
            first = request.blocks[start // size] * size
            pieces.append(self._vectors.between(first, first + min(size, request.tokens - start)))
        return torch.cat([k for k, _ in pieces], dim=1), torch.cat([v for _, v in pieces], dim=1)

    def _token_ids(self, request: TraceRequest) -> Iterator[int]:
        for position in range(request.tokens):
            block, offset = divmod(position, self._block_tokens)
            yield request.blocks[block] * self._block_tokens + offset
