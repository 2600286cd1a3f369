import asyncio

import pytest

from kvstore_server.errors import NotFound, Unavailable
from kvstore_server.identity import key_ring
from kvstore_server.identity.caller import Caller
from kvstore_server.identity.key_ring import STALE_SECONDS, KeyRing
from kvstore_server.identity.key_store import KeyStore

from ..storage.memory_store import MemoryStore


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Parts:
    """One store with its keys, and a ring that reads them when it is told to."""

    def __init__(self) -> None:
        self.time, self.store = Time(), MemoryStore()
        self.keys = KeyStore(self.store, self.time)
        self.ring = KeyRing(KeyStore(self.store), self.time, self.time)


@pytest.fixture
def parts() -> Parts:
    return Parts()


def id_of(token: str) -> str:
    return token.split("_")[1]


def test_a_key_names_its_tenant_and_role(parts: Parts) -> None:
    token = parts.keys.create("acme", "writer")
    parts.ring.refresh()
    caller = parts.ring.caller_of(token)
    assert caller == Caller("acme", "writer", f"key {id_of(token)}", id_of(token))


def test_nothing_else_names_anyone(parts: Parts) -> None:
    token, other = parts.keys.create("acme", "writer"), parts.keys.create("acme", "writer")
    parts.ring.refresh()
    for wrong in ("", "x", token[:-1], token + "a", f"{token[:21]}{other[21:]}", f"kvs_{'0' * 16}_{token[21:]}"):
        assert parts.ring.caller_of(wrong) is None


def test_a_key_is_good_until_it_expires(parts: Parts) -> None:
    token = parts.keys.create("acme", "reader", lifetime_seconds=10)
    parts.ring.refresh()
    parts.time.now += 9.9
    assert parts.ring.caller_of(token)
    assert parts.ring.is_good(id_of(token))
    parts.time.now += 0.1
    assert parts.ring.caller_of(token) is None
    assert not parts.ring.is_good(id_of(token))


def test_a_revoked_key_is_refused_from_the_next_look_on(parts: Parts) -> None:
    token = parts.keys.create("acme", "reader")
    parts.ring.refresh()
    assert parts.keys.revoke(id_of(token))
    assert not parts.keys.revoke(id_of(token))
    parts.ring.refresh()
    assert parts.ring.caller_of(token) is None
    assert not parts.ring.is_good(id_of(token))


def test_only_keys_that_are_there_can_be_revoked(parts: Parts) -> None:
    for key_id in ("0" * 16, "x", "../../x", ""):
        with pytest.raises(NotFound):
            parts.keys.revoke(key_id)


def test_a_damaged_record_is_no_key_and_hides_no_other(parts: Parts) -> None:
    token, other = parts.keys.create("acme", "reader"), parts.keys.create("acme", "reader")
    name = f"_keys/{id_of(token)}.json"
    parts.store.objects[name] = parts.store.objects[name].replace(b"reader", b"writer")
    parts.store.objects["_keys/README"] = b"what others put there is left alone"
    parts.ring.refresh()
    assert parts.ring.caller_of(token) is None
    assert parts.ring.caller_of(other)


def test_keys_that_were_read_too_long_ago_are_neither_good_nor_bad(parts: Parts) -> None:
    token = parts.keys.create("acme", "reader")
    parts.ring.refresh()
    parts.time.now += STALE_SECONDS
    assert parts.ring.caller_of(token)
    parts.time.now += 0.1
    for ask in (lambda: parts.ring.caller_of(token), lambda: parts.ring.caller_of("x")):
        with pytest.raises(Unavailable):
            ask()
    with pytest.raises(Unavailable):
        parts.ring.is_good(id_of(token))


def test_a_look_costs_one_list_and_one_read_of_each_new_key(parts: Parts) -> None:
    for _ in range(3):
        parts.keys.create("acme", "reader")
    parts.ring.refresh()
    parts.store.calls.clear()
    parts.keys.create("acme", "reader")
    parts.store.calls.clear()
    parts.ring.refresh()
    assert parts.store.calls == ["list_keys", "get"]


async def test_the_store_is_asked_again_after_it_failed(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_ring, "REFRESH_SECONDS", 0.01)
    token = parts.keys.create("acme", "reader")
    await parts.ring.start()
    try:
        objects, parts.store.objects = parts.store.objects, None  # pyright: ignore[reportAttributeAccessIssue]
        await asyncio.sleep(0.1)
        assert parts.ring.caller_of(token)
        parts.store.objects = objects
        parts.keys.revoke(id_of(token))
        async with asyncio.timeout(5):
            while parts.ring.caller_of(token):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await parts.ring.close()
