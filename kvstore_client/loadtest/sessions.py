"""The sessions of one load test: made, filled and checked before it, deleted after it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from kvstore_client import AsyncKVStoreClient, KVStoreError, Session
from kvstore_client.loadtest.checking import is_attention_over_what_was_sent
from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.vectors import Vectors, queries
from kvstore_codecs.spec import ModelShape

APPEND_BYTES = 64 << 20
CHECK_ROWS = 4
CHECK_SECONDS = 60.0


class WrongAnswers(Exception):
    """The server answers wrongly even while nothing else goes on."""


@dataclass(frozen=True)
class Run:
    """What one load test calls its sessions; `ttl_seconds` is for those that it could not delete."""

    name: str
    ttl_seconds: float

    def shape(self, load: Load) -> ModelShape:
        """Of a model of its own: prefixes are matched within one run."""
        return load.shape.model_copy(update={"model_fingerprint": self.name})

    def asked(self, load: Load, worker: int) -> str | None:
        """The session that this worker queries."""
        if load.scenario in ("ingest", "trace"):
            return None
        return f"{self.name}-own-{worker}" if load.scenario == "private" else f"{self.name}-shared"

    def appended(self, load: Load, worker: int) -> str | None:
        """The session that this worker appends to."""
        return f"{self.name}-append-{worker}" if load.scenario in ("ingest", "mixed", "failover") else None


@asynccontextmanager
async def prepared(
    client: AsyncKVStoreClient, load: Load, run: Run, progress: Callable[[int, int], None]
) -> AsyncIterator[Session | None]:
    """Makes every session that `run` names; yields one that is queried, if any is. WrongAnswers if one is wrong."""
    workers = range(load.workers)
    filled = {name for worker in workers if (name := run.asked(load, worker)) is not None}
    empty = {name for worker in workers if (name := run.appended(load, worker)) is not None}
    shape, session = run.shape(load), None
    try:
        for name in sorted(empty):
            await client.create_session(name, shape, load.spec, ttl_seconds=run.ttl_seconds)
        vectors = Vectors(shape, load.seed, 1) if filled else None
        for number, name in enumerate(sorted(filled)):
            assert vectors is not None
            session = await client.create_session(name, shape, load.spec, ttl_seconds=run.ttl_seconds)
            done = number * load.tokens
            await _fill(session, vectors, load.tokens, lambda n, d=done: progress(d + n, load.tokens * len(filled)))
            rows = queries(shape, load.seed, CHECK_ROWS)
            if not await is_attention_over_what_was_sent(session, vectors, rows, CHECK_SECONDS):
                raise WrongAnswers(f"session {name} does not answer attention over what was appended")
        yield session
    finally:
        with suppress(KVStoreError):  # then they expire
            # By name where the names are known: listing needs the index.
            for name in sorted(filled | empty) or [info.name for info in await client.list_sessions(run.name)]:
                await client.delete_session(name)


async def _fill(session: Session, vectors: Vectors, tokens: int, progress: Callable[[int], None]) -> None:
    piece = max(1, APPEND_BYTES // session.shape.raw_bytes_per_token)
    while (start := session.length) < tokens:
        k, v = vectors.between(start, min(start + piece, tokens, vectors.reach(start)))
        progress(await session.append(k, v))
