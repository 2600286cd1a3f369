"""What a process knows of one generation of one session: facts of its meta records and, once read, its appends."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from threading import RLock

from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_server.storage.meta import Ancestor
from kvstore_server.storage.segment_header import Identity, SegmentHeader


@dataclass(frozen=True, slots=True)
class AppendEntry:
    """One append of a session, or what a fork shares of it: `end` is then below `start + tokens`.

    `session` and `generation` are the owner's. `damage` says why the object cannot be trusted; its other facts are then
    only what its neighbours tell, its digest is empty, and reading it is DataLoss.
    """

    key: str
    session: str
    generation: str
    start: int
    tokens: int
    end: int
    digest: str
    previous: int | None = None
    previous_digest: str = ""
    exact: int = 0
    fit_range: tuple[int, int] | None = None
    block_hashes: tuple[bytes, ...] = ()
    block_tokens: int = 0
    stored_bytes: int = 0
    created_unix_seconds: float = 0.0
    damage: str = ""

    def identity(self, tenant: str) -> Identity:
        return Identity(tenant, self.session, self.generation, self.start)

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """(end, chained hash) of the token-id blocks that end in this append, as far as it is shared."""
        for number, block_hash in enumerate(self.block_hashes if self.block_tokens else (), start=1):
            end = (self.start // self.block_tokens + number) * self.block_tokens
            if end <= self.end:
                yield end, block_hash


def entry_of(key: str, header: SegmentHeader, stored_bytes: int) -> AppendEntry:
    return AppendEntry(
        key=key,
        session=header.identity.session,
        generation=header.identity.generation,
        start=header.start,
        tokens=header.tokens,
        end=header.end,
        digest=header.digest,
        previous=header.previous,
        previous_digest=header.previous_digest,
        exact=header.geometry.exact,
        fit_range=header.fit_range,
        block_hashes=header.block_hashes,
        block_tokens=header.block_tokens,
        stored_bytes=stored_bytes,
        created_unix_seconds=header.created_unix_seconds,
    )


@dataclass
class SessionState:
    """One living generation, as of meta record `seq`.

    `entries` is None until the log was read; CommitLog keeps it up to date under `lock`, nothing else changes it.
    """

    tenant: str
    session: str
    generation: str
    seq: int
    spec: CodecSpec
    shape: ModelShape
    ttl_seconds: float | None
    pinned: bool
    created_unix_seconds: float
    ancestors: tuple[Ancestor, ...]
    entries: list[AppendEntry] | None = None
    lock: RLock = field(default_factory=RLock, compare=False, repr=False)

    @property
    def base(self) -> int:
        """Positions below it are shared with ancestors."""
        return self.ancestors[-1].end if self.ancestors else 0

    @property
    def length(self) -> int:
        """As far as the log was read."""
        return self.entries[-1].end if self.entries else self.base

    def shared(self, end: int) -> tuple[Ancestor, ...]:
        """The ancestors of a fork at `end`, at most the length: flattened, so that no chain is ever followed."""
        chain = [*self.ancestors, Ancestor(session=self.session, generation=self.generation, end=self.length)]
        starts = [0, *(ancestor.end for ancestor in chain)]
        return tuple(
            ancestor.model_copy(update={"end": min(ancestor.end, end)})
            for start, ancestor in zip(starts, chain, strict=False)
            if start < min(ancestor.end, end)
        )

    def shared_entries(self, end: int) -> list[AppendEntry]:
        """The entries of a fork at `end`."""
        return [cut(entry, end) for entry in self.entries or () if entry.start < end]


def cut(entry: AppendEntry, end: int) -> AppendEntry:
    """The entry, shared only up to `end`."""
    return entry if entry.end <= end else replace(entry, end=end)


def follows(entry: AppendEntry, previous: AppendEntry | None) -> bool:
    """Whether `entry` was appended right after `previous` (None: to an empty session), as far as both are whole."""
    if entry.damage or (previous and previous.damage):
        return True
    expected = (previous.start, previous.digest) if previous else (None, "")
    return (entry.previous, entry.previous_digest) == expected
