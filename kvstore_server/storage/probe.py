"""Proves at the start what every commit rests on: of all who create a name one wins, and a list shows what was put."""

import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor

from kvstore_server.errors import KVStoreError, Unavailable
from kvstore_server.storage.store import ObjectStore

FOLDER = "_probe"
RACERS = 8


def prove_create_once(store: ObjectStore) -> None:
    """Unavailable (STORE_UNSAFE) unless `store` refuses a second create, also among racers, and lists what was put."""
    key, raced = (f"{FOLDER}/{secrets.token_hex(16)}" for _ in range(2))
    bodies = [b"racer %d" % number for number in range(RACERS)]
    try:
        store.put_if_absent(key, [b"first"])
        refused = not store.put_if_absent(key, [b"second"])
        kept = bytes(store.get(key)) == b"first"
        listed = key in store.list_keys(FOLDER)
        with ThreadPoolExecutor(RACERS) as racers:
            won = list(racers.map(lambda body: store.put_if_absent(raced, [body]), bodies))
        winners = [body for body, created in zip(bodies, won, strict=True) if created]
        found = bytes(store.get(raced))
    finally:
        for each in (key, raced):
            with contextlib.suppress(KVStoreError):
                store.delete(each)
    if not (refused and kept and winners in ([], [found])):  # none: the winner's answer was lost, and it asked again
        raise Unavailable("STORE_UNSAFE", "the store does not refuse to create an object twice")
    if not listed:
        raise Unavailable("STORE_UNSAFE", "the store does not list an object that it has just taken")
