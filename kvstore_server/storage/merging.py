"""Writes small neighbouring objects of a session as one, and says so in its meta log (docs/format.md, section 6).

Nothing is removed here: those who know where appends lay before find them there for the grace of the collector.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.keys import log_folder, log_starts, merged_key, merged_name
from kvstore_server.storage.merged_segment import merged_segment
from kvstore_server.storage.meta import MERGED_MAX, Floor, MergedRange
from kvstore_server.storage.meta_log import MetaLog
from kvstore_server.storage.segment import Segment, write_segment
from kvstore_server.storage.session_state import AppendEntry, SessionState, range_at
from kvstore_server.storage.store import ObjectStore

TABLE_ROWS_MAX = 16_384
"""Appends and block hashes of one object: they must find room in its header."""


@dataclass(frozen=True)
class MergeBounds:
    """When merging is worth while, and how much one merge reads and writes at most."""

    objects_min: int
    object_bytes_max: int


@dataclass(frozen=True)
class Cut:
    """What a session's objects are to be cut to, and how: `of` drops the bits that levels finer than `floor` read."""

    floor: Floor
    of: Callable[[Segment], Segment]


@dataclass(frozen=True)
class _StoredObject:
    """One object of a session's own log, and the appends in it."""

    entries: Sequence[AppendEntry]

    @property
    def is_sound(self) -> bool:
        return not any(entry.damage for entry in self.entries)

    @cached_property
    def stored_bytes(self) -> int:
        return sum(entry.stored_bytes for entry in self.entries)

    @property
    def floor(self) -> Floor:
        merged = self.entries[0].merged
        return merged.floor if merged else (0, 0)

    @property
    def epoch(self) -> int:
        return self.entries[0].epoch

    @property
    def table_rows(self) -> int:
        return sum(1 + len(entry.block_hashes) for entry in self.entries)


class Merger:
    """The sessions of one tenant. Blocking. Any number of them may work on one session: one wins each checkpoint."""

    def __init__(
        self, store: ObjectStore, tenant: str, bounds: MergeBounds, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._tenant, self._bounds, self._clock = store, tenant, bounds, clock
        self._log, self._meta = CommitLog(store, tenant, clock), MetaLog(store, tenant, clock)

    def is_due(self, state: SessionState, cut: Cut | None = None) -> bool:
        """Whether `merge` would find something to do in a state whose log was read. Asks no store."""
        return bool(self._chosen(state, cut))

    def may_be_due(self, state: SessionState) -> bool:
        """As is_due, by one list of names, of a state whose log was not read."""
        starts = log_starts(self._store.list_keys(log_folder(self._tenant, state.session, state.generation)))
        return sum(range_at(state.merged, start) is None for start in starts) >= self._bounds.objects_min

    def merge(self, state: SessionState, cut: Cut | None = None) -> MergedRange | None:
        """Merges one run of objects, if there is one and nobody else changes the session meanwhile.

        With a cut also what only needs cutting; a session that was cut once is merged only with one. Aborted if the
        generation is gone; DataLoss if an object is damaged: then all stay as they are.
        """
        state = self._log.snapshot(state)
        self._meta.refresh(state)
        run, floor = self._chosen(state, cut), cut.floor if cut else state.own_floor
        if not run:
            return None
        start, end = run[0].entries[0].start, run[-1].entries[-1].end
        others = [each for each in state.merged if each.end <= start or end <= each.start]
        if len(others) == MERGED_MAX:
            return None
        seq = state.seq
        segments = [self._log.read(state, each.entries[0]) for each in run]
        if state.seq != seq:
            return None  # somebody else has merged them
        segment = merged_segment([cut.of(each) for each in segments] if cut else segments, self._clock(), floor)
        writer = secrets.token_hex(16)
        name = merged_name(seq + 1, writer)
        key = merged_key(self._tenant, state.session, state.generation, name)
        parts = write_segment(segment)
        merged = MergedRange(
            start=start,
            end=end,
            name=name,
            digest=segment.header.digest,
            stored_bytes=sum(map(len, parts)),
            floor=floor,
        )
        ranges = tuple(sorted([*others, merged], key=lambda each: each.start))
        if not self._store.put_if_absent(key, parts):
            return None
        if not self._meta.checkpoint(state, writer, ranges, floor):
            self._store.delete(key)  # its number went to another record, so no checkpoint can ever name it
            return None
        return merged

    def _chosen(self, state: SessionState, cut: Cut | None) -> list[_StoredObject]:
        """The first run that is worth it: small neighbours, the first not larger than all others together.

        So every byte is written again at most as often as its object's size doubles. What is to be cut comes first.
        """
        floor = cut.floor if cut else (0, 0)
        if any(new < old for new, old in zip(floor, state.own_floor, strict=True)):
            return []
        own = (e for e in state.entries or () if (e.session, e.generation) == (state.session, state.generation))
        objects = [_StoredObject(list(group)) for _, group in groupby(own, key=lambda entry: entry.key)]
        if whole := [each for each in objects if each.floor != floor and each.is_sound]:
            return self._neighbours(objects, whole[0], floor)
        for run in self._runs(objects):
            rest = sum(each.stored_bytes for each in run)
            for number, each in enumerate(run):
                rest -= each.stored_bytes
                if each.stored_bytes <= rest:
                    if len(run) - number >= self._bounds.objects_min:
                        return run[number:]
                    break
        return []

    def _neighbours(self, objects: Sequence[_StoredObject], first: _StoredObject, floor: Floor) -> list[_StoredObject]:
        """An object that is to be cut, whatever its size, and those after it that are too, within the bounds."""
        run, full = list[_StoredObject](), 0.0
        for each in objects[objects.index(first) :]:
            full += self._share(each)
            if run and (full > 1 or each.floor == floor or not each.is_sound or each.epoch != first.epoch):
                break
            run.append(each)
        return run

    def _share(self, each: _StoredObject) -> float:
        return max(each.stored_bytes / self._bounds.object_bytes_max, each.table_rows / TABLE_ROWS_MAX)

    def _runs(self, objects: Sequence[_StoredObject]) -> Iterator[list[_StoredObject]]:
        """Sound neighbours of one epoch, each below half of the bounds, that are within them together."""
        run: list[_StoredObject] = []
        full = 0.0
        for each in objects:
            share = self._share(each)
            small = share <= 0.5 and each.is_sound
            if not small or full + share > 1 or (run and run[0].epoch != each.epoch):
                yield run
                run, full = [], 0.0
            if small:
                run.append(each)
                full += share
        yield run
