"""What a process knows of one generation of one session: facts of its meta records and, once read, its appends."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import RLock

from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_server.storage.keys import POSITION_MAX, merged_key
from kvstore_server.storage.meta import Ancestor, Floor, MergedRange
from kvstore_server.storage.segment_header import Identity, SegmentHeader


@dataclass(frozen=True, slots=True)
class AppendEntry:
    """One append of a session, or what a fork shares of it: `end` is then below `start + tokens`.

    `session` and `generation` are the owner's. `key` names the object that holds it: its own, or that of all `merged`.
    `damage` says why the object cannot be trusted; its other facts are then only what its neighbours tell, its digest
    is empty, and reading it is DataLoss.
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
    fit_range: tuple[int, int] | None = None
    epoch: int = 0
    block_hashes: tuple[bytes, ...] = ()
    block_tokens: int = 0
    stored_bytes: int = 0
    damage: str = ""
    merged: MergedRange | None = None

    def identity(self, tenant: str) -> Identity:
        return Identity(tenant, self.session, self.generation, self.start)

    def of_object(self, tenant: str) -> tuple[Identity, int, str]:
        """What the header of its object must say: identity, end and digest."""
        if self.merged is None:
            return self.identity(tenant), self.start + self.tokens, self.digest
        return replace(self.identity(tenant), start=self.merged.start), self.merged.end, self.merged.digest

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """(end, chained hash) of the token-id blocks that end in this append, as far as it is shared."""
        for number, block_hash in enumerate(self.block_hashes if self.block_tokens else (), start=1):
            end = (self.start // self.block_tokens + number) * self.block_tokens
            if end <= self.end:
                yield end, block_hash


def entry_of(key: str, header: SegmentHeader, stored_bytes: int) -> AppendEntry:
    """Of an object of one append."""
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
        fit_range=header.fit_range,
        epoch=header.epoch,
        block_hashes=header.block_hashes,
        block_tokens=header.block_tokens,
        stored_bytes=stored_bytes,
    )


def merged_entries(key: str, header: SegmentHeader, merged: MergedRange) -> list[AppendEntry]:
    """Of a merged object, in order."""
    entries: list[AppendEntry] = []
    previous, previous_digest, start = header.previous, header.previous_digest, header.start
    for number, append in enumerate(header.appends):
        entry = AppendEntry(
            key=key,
            session=header.identity.session,
            generation=header.identity.generation,
            start=start,
            tokens=append.tokens,
            end=start + append.tokens,
            digest=append.digest,
            previous=previous,
            previous_digest=previous_digest,
            fit_range=header.fit_range if number == header.fit_append else None,
            epoch=header.epoch,
            block_hashes=append.block_hashes,
            block_tokens=append.block_tokens,
        )
        entries.append(_inside(entry, merged, key))
        previous, previous_digest, start = start, append.digest, entry.end
    return entries


def _inside(entry: AppendEntry, merged: MergedRange, key: str) -> AppendEntry:
    """The entry with its object: of the object's bytes it has a share, and all entries together have all."""
    first, last = (
        merged.stored_bytes * (place - merged.start) // (merged.end - merged.start)
        for place in (entry.start, entry.start + entry.tokens)
    )
    return replace(entry, key=key, merged=merged, stored_bytes=last - first)


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
    merged: tuple[MergedRange, ...] = ()
    """Where its own appends lie that are not under their log names."""
    own_floor: Floor = (0, 0)
    shared_floor: Floor = (0, 0)
    """Of what it shares, once its log was read."""
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

    @property
    def floor(self) -> Floor:
        """The finest level of keys and values that all of it is there at."""
        (keys, values), (shared_keys, shared_values) = self.own_floor, self.shared_floor
        return max(keys, shared_keys), max(values, shared_values)

    def adopt(self, merged: tuple[MergedRange, ...], floor: Floor) -> None:
        """What a checkpoint says of its own appends; those that are known stay what they are and change their place."""
        self.merged, self.own_floor = merged, floor
        move(self.entries or [], self.tenant, self.session, self.generation, merged)

    def at(self, position: int) -> AppendEntry | None:
        """The append that holds a position, as far as the log was read."""
        entries = self.entries or []
        index = bisect_right(entries, position, key=lambda entry: entry.start) - 1
        return entries[index] if index >= 0 and position < entries[index].end else None

    def share(self, floor: Floor) -> None:
        """What it shares was cut to this level, some of it at least."""
        keys, values = (max(pair) for pair in zip(self.shared_floor, floor, strict=True))
        self.shared_floor = keys, values

    def owned_end(self, session: str, generation: str) -> int:
        """Positions from there on are not that generation's."""
        ends = (a.end for a in self.ancestors if (a.session, a.generation) == (session, generation))
        return next(ends, POSITION_MAX + 1)

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


def range_at(merged: Sequence[MergedRange], position: int) -> MergedRange | None:
    """The merged range that holds a position."""
    index = bisect_right(merged, position, key=lambda each: each.start) - 1
    return merged[index] if index >= 0 and position < merged[index].end else None


def move(entries: list[AppendEntry], tenant: str, session: str, generation: str, merged: Sequence[MergedRange]) -> None:
    """Gives those appends of this generation that lie in merged objects their new place, in the list itself."""
    for each in merged:
        key = merged_key(tenant, session, generation, each.name)
        first = bisect_left(entries, each.start, key=lambda entry: entry.start)
        last = bisect_left(entries, each.end, key=lambda entry: entry.start)
        for index in range(first, last):
            entry = entries[index]
            if (entry.session, entry.generation) == (session, generation) and entry.key != key and not entry.damage:
                entries[index] = _inside(entry, each, key)


def cut(entry: AppendEntry, end: int) -> AppendEntry:
    """The entry, shared only up to `end`."""
    return entry if entry.end <= end else replace(entry, end=end)


def follows(entry: AppendEntry, previous: AppendEntry | None) -> bool:
    """Whether `entry` was appended right after `previous` (None: to an empty session), as far as both are whole."""
    if entry.damage or (previous and previous.damage):
        return True
    expected = (previous.start, previous.digest) if previous else (None, "")
    return (entry.previous, entry.previous_digest) == expected
