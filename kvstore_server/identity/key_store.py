"""API keys in the store: a record each, and a second object once one is revoked. Blocking."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvstore_server.errors import NotFound
from kvstore_server.identity.api_keys import KeyRecord, make_key, read_key_record, write_key_record
from kvstore_server.identity.caller import Role
from kvstore_server.storage.store import ObjectStore

FOLDER = "_keys"
_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)
_NAME = re.compile(rf"{FOLDER}/([0-9a-f]{{16}})(\.revoked)?\.json", re.ASCII)


@dataclass(frozen=True)
class StoredKey:
    """`record` is None if its object cannot be read: the key is refused then."""

    id: str
    record: KeyRecord | None
    revoked: bool


class KeyStore:
    """What was read of a record is kept, as records never change."""

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._known: dict[str, KeyRecord | None] = {}

    def create(self, tenant: str, role: Role, *, label: str = "", lifetime_seconds: float | None = None) -> str:
        """A new key of the tenant: the only time that it can be read. ValueError for what is not allowed."""
        now = self._clock()
        expires = None if lifetime_seconds is None else now + lifetime_seconds
        token, record = make_key(tenant, role, label=label, created_unix_seconds=now, expires_unix_seconds=expires)
        created = self._store.put_if_absent(_record_name(record.id), [write_key_record(record)])
        assert created, "64 random bits were taken already"
        return token

    def revoke(self, key_id: str) -> bool:
        """True if the key was good until now; NotFound."""
        if not _ID.fullmatch(key_id) or _record_name(key_id) not in self._store.list_keys(FOLDER):
            raise NotFound("KEY_NOT_FOUND", f"there is no key {key_id}")
        when = f'{{"created_unix_seconds":{self._clock()}}}'
        return self._store.put_if_absent(f"{FOLDER}/{key_id}.revoked.json", [when.encode()], urgent=True)

    def all(self) -> dict[str, StoredKey]:
        """Every key there is, by its id. What lists and reads costs one list and one read of each new key."""
        names = [match for key in self._store.list_keys(FOLDER) if (match := _NAME.fullmatch(key))]
        revoked = {name[1] for name in names if name[2]}
        present = [name[1] for name in names if not name[2]]
        self._known = {
            key_id: self._known[key_id] if key_id in self._known else self._read(key_id) for key_id in present
        }
        return {key_id: StoredKey(key_id, record, key_id in revoked) for key_id, record in self._known.items()}

    def _read(self, key_id: str) -> KeyRecord | None:
        try:
            return read_key_record(self._store.get(_record_name(key_id)), key_id)
        except (KeyError, ValueError):
            return None


def _record_name(key_id: str) -> str:
    return f"{FOLDER}/{key_id}.json"
