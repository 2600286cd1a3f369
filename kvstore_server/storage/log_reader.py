"""Reads logs: objects in order, each header verified, what is missing or damaged named instead of skipped."""

from dataclasses import replace
from functools import partial

from kvstore_server.storage.checksums import whole_damage
from kvstore_server.storage.container import HEADER_CRC_BYTES, DamagedError, data_offset
from kvstore_server.storage.geometry import layout_of
from kvstore_server.storage.in_order import in_order
from kvstore_server.storage.keys import log_folder, log_key, log_starts
from kvstore_server.storage.segment import data_loss, read_header
from kvstore_server.storage.segment_header import Identity
from kvstore_server.storage.session_state import AppendEntry, SessionState, cut, entry_of, follows
from kvstore_server.storage.store import ObjectStore

HEAD_BYTES = 16 << 10
"""Read first: enough for the header of all but the largest appends."""


def read_entry(store: ObjectStore, identity: Identity) -> AppendEntry:
    """One append from its header.

    Raises KeyError if there is no object, DamagedError if it cannot be trusted, FailedPrecondition if a newer version
    wrote it.
    """
    key = _key(identity)
    head = memoryview(store.get_range(key, 0, HEAD_BYTES))
    needed = data_offset(head) + HEADER_CRC_BYTES
    if needed > len(head):
        head = memoryview(store.get_range(key, 0, needed))
    header = read_header(head, identity)
    return entry_of(key, header, data_offset(head) + layout_of(header.geometry).data_bytes)


def read_entries(store: ObjectStore, state: SessionState) -> list[AppendEntry]:
    """All appends of a session: what it shares with ancestors, then its own.

    A missing or damaged object is an entry with `damage`, as long as what its neighbours tell. Of the session's last
    object they tell nothing: it is left out, and who looks for the next append finds it. DataLoss if objects overlap.
    """
    entries: list[AppendEntry] = []
    for owner in state.ancestors:
        begin = entries[-1].end if entries else 0
        entries += _read_log(store, Identity(state.tenant, owner.session, owner.generation, begin), owner.end)
    entries += _read_log(store, Identity(state.tenant, state.session, state.generation, state.base), None)
    broken = [i for i, entry in enumerate(entries) if not follows(entry, entries[i - 1] if i else None)]
    for index in {place for i in broken for place in (i - 1, i) if place >= 0}:  # either may be the stranger
        entries[index] = _damaged(entries[index].identity(state.tenant), entries[index].end, "of another history")
    return entries


def _read_log(store: ObjectStore, first: Identity, limit: int | None) -> list[AppendEntry]:
    """One generation's own log from `first` on, cut at `limit`."""
    starts = log_starts(store.list_keys(log_folder(first.tenant, first.session, first.generation)))
    starts = [start for start in starts if limit is None or start < limit]
    identities = [replace(first, start=start) for start in starts]
    entries: list[AppendEntry] = []
    position = first.start
    read = in_order(partial(_entry_or_error, store), identities, store.reads_at_once)
    for identity, entry, following in zip(identities, read, [*starts[1:], limit], strict=False):
        start = identity.start
        if start < position:
            raise data_loss(identity, whole_damage(start, position, "two objects hold these positions"))
        if start > position:
            entries.append(_damaged(replace(identity, start=position), start, "missing"))
        if not isinstance(entry, AppendEntry):
            if following is None:
                return entries
            entry = _damaged(identity, following, str(entry))
        entries.append(entry if limit is None else cut(entry, limit))
        position = entries[-1].end
    if limit is not None and position < limit:
        entries.append(_damaged(replace(first, start=position), limit, "missing"))
    return entries


def _entry_or_error(store: ObjectStore, identity: Identity) -> AppendEntry | DamagedError | KeyError:
    try:
        return read_entry(store, identity)
    except (DamagedError, KeyError) as error:
        return error


def _damaged(identity: Identity, end: int, what: str) -> AppendEntry:
    return AppendEntry(
        key=_key(identity),
        session=identity.session,
        generation=identity.generation,
        start=identity.start,
        tokens=end - identity.start,
        end=end,
        digest="",
        damage=what,
    )


def _key(identity: Identity) -> str:
    return log_key(identity.tenant, identity.session, identity.generation, identity.start)
