"""Reads logs: objects in order, each header verified, what is missing or damaged named instead of skipped."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from kvstore_server.storage.checksums import whole_damage
from kvstore_server.storage.container import HEADER_CRC_BYTES, DamagedError, data_offset
from kvstore_server.storage.geometry import layout_of
from kvstore_server.storage.in_order import in_order
from kvstore_server.storage.keys import log_folder, log_key, log_starts, merged_key
from kvstore_server.storage.meta import Ancestor, MergedRange
from kvstore_server.storage.segment import data_loss, read_header
from kvstore_server.storage.segment_header import Identity, SegmentHeader
from kvstore_server.storage.session_state import (
    AppendEntry,
    SessionState,
    cut,
    entry_of,
    follows,
    merged_entries,
    range_at,
)
from kvstore_server.storage.store import ObjectStore

HEAD_BYTES = 16 << 10
"""Read first: enough for the header of all but the largest appends."""


def read_entry(store: ObjectStore, identity: Identity) -> AppendEntry:
    """One append from its header.

    Raises KeyError if there is no object, DamagedError if it cannot be trusted, FailedPrecondition if a newer version
    wrote it.
    """
    key = _key(identity)
    header, data_start = read_head(store, key, identity)
    if header.appends:
        raise DamagedError("a merged object")
    return entry_of(key, header, data_start + layout_of(header.geometry).data_bytes)


def read_merged(store: ObjectStore, identity: Identity, merged: MergedRange) -> list[AppendEntry]:
    """The appends of a merged object; DamagedError also if there is no object."""
    key = _merged_key(identity, merged)
    try:
        header, _ = read_head(store, key, replace(identity, start=merged.start))
    except KeyError:
        raise DamagedError("missing") from None
    if not header.appends or (header.end, header.digest) != (merged.end, merged.digest):
        raise DamagedError("another object")
    return merged_entries(key, header, merged)


def read_head(store: ObjectStore, key: str, identity: Identity) -> tuple[SegmentHeader, int]:
    """An object's header, and where its data starts."""
    head = memoryview(store.get_range(key, 0, HEAD_BYTES))
    needed = data_offset(head) + HEADER_CRC_BYTES
    if needed > len(head):
        head = memoryview(store.get_range(key, 0, needed))
    return read_header(head, identity), data_offset(head)


def read_after(store: ObjectStore, state: SessionState, position: int) -> list[AppendEntry]:
    """What its log has from `position` on, the next object; KeyError if there is none, DamagedError."""
    identity = Identity(state.tenant, state.session, state.generation, position)
    merged = range_at(state.merged, position)
    if merged is None:
        return [read_entry(store, identity)]
    found = [entry for entry in read_merged(store, identity, merged) if entry.start >= position]
    if not found:
        raise DamagedError("of another history")
    return found


def read_entries(
    store: ObjectStore, state: SessionState, merged: Mapping[Ancestor, Sequence[MergedRange]]
) -> list[AppendEntry]:
    """All appends of a session: what it shares with ancestors, whose merged ranges are given, then its own.

    A missing or damaged object is an entry with `damage`, as long as what its neighbours tell. Of the session's last
    object they tell nothing: it is left out, and who looks for the next append finds it. DataLoss if objects overlap.
    """
    entries: list[AppendEntry] = []
    for owner in state.ancestors:
        begin = entries[-1].end if entries else 0
        first = Identity(state.tenant, owner.session, owner.generation, begin)
        entries += _read_log(store, first, owner.end, merged[owner])
    own = Identity(state.tenant, state.session, state.generation, state.base)
    entries += _read_log(store, own, None, state.merged)
    broken = [i for i, entry in enumerate(entries) if not follows(entry, entries[i - 1] if i else None)]
    for index in {place for i in broken for place in (i - 1, i) if place >= 0}:  # either may be the stranger
        entries[index] = replace(entries[index], digest="", damage="of another history")
    return entries


class _Object(NamedTuple):
    """One object of a log: of one append, or a merged one."""

    start: int
    merged: MergedRange | None


def _read_log(
    store: ObjectStore, first: Identity, limit: int | None, merged: Sequence[MergedRange]
) -> list[AppendEntry]:
    """One generation's own log from `first` on, cut at `limit`. Log names within merged ranges are read no more."""
    starts = log_starts(store.list_keys(log_folder(first.tenant, first.session, first.generation)))
    objects = [_Object(start, None) for start in starts if range_at(merged, start) is None]
    objects = sorted([*objects, *(_Object(each.start, each) for each in merged)], key=lambda each: each.start)
    objects = [each for each in objects if limit is None or each.start < limit]
    entries: list[AppendEntry] = []
    position = first.start
    read = in_order(partial(_read_or_error, store, first), objects, store.reads_at_once)
    followers = [*(each.start for each in objects[1:]), limit]
    for (start, place), found, following in zip(objects, read, followers, strict=False):
        identity = replace(first, start=start)
        if start < position:
            raise data_loss(identity, whole_damage(start, position, "two objects hold these positions"))
        if start > position:
            entries.append(_damaged(replace(identity, start=position), start, "missing"))
        if not isinstance(found, list):
            end = place.end if place else following
            if end is None:
                return entries
            found = [_damaged(identity, end, str(found), place)]
        entries += found if limit is None else [cut(entry, limit) for entry in found if entry.start < limit]
        position = entries[-1].end
    if limit is not None and position < limit:
        entries.append(_damaged(replace(first, start=position), limit, "missing"))
    return entries


def _read_or_error(store: ObjectStore, log: Identity, place: _Object) -> list[AppendEntry] | DamagedError | KeyError:
    identity = replace(log, start=place.start)
    try:
        return read_merged(store, identity, place.merged) if place.merged else [read_entry(store, identity)]
    except (DamagedError, KeyError) as error:
        return error


def _damaged(identity: Identity, end: int, what: str, merged: MergedRange | None = None) -> AppendEntry:
    return AppendEntry(
        key=_merged_key(identity, merged) if merged else _key(identity),
        session=identity.session,
        generation=identity.generation,
        start=identity.start,
        tokens=end - identity.start,
        end=end,
        digest="",
        damage=what,
        merged=merged,
    )


def _key(identity: Identity) -> str:
    return log_key(identity.tenant, identity.session, identity.generation, identity.start)


def _merged_key(identity: Identity, merged: MergedRange) -> str:
    return merged_key(identity.tenant, identity.session, identity.generation, merged.name)
