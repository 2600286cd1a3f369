"""What a fresh reader finds in a store: the side of every test that is not under test."""

from typing import NamedTuple

from kvstore_server.storage.keys import ref_key
from kvstore_server.storage.store import ObjectStore

from .inputs import TENANT, commit_log


class Found(NamedTuple):
    """One living session: its generation, attributes, and (start, end, digest) of its appends."""

    generation: str
    ttl_seconds: float | None
    pinned: bool
    appends: tuple[tuple[int, int, str], ...]


def facts_of(store: ObjectStore) -> dict[str, Found]:
    """Every living session, each append read to its last byte; KeyError if a fork's reference is missing."""
    log = commit_log(store)
    found: dict[str, Found] = {}
    for name in log.sessions():
        state = log.load(name)
        if state is None:
            continue
        for owner in state.ancestors:  # or what it shares may be collected
            store.size(ref_key(TENANT, owner.session, owner.generation, name, state.generation))
        entries = log.appends(state)
        for entry in entries:
            log.read(state, entry)
        appends = tuple((entry.start, entry.end, entry.digest) for entry in entries)
        found[name] = Found(state.generation, state.ttl_seconds, state.pinned, appends)
    return found
