"""Objects in a bucket of an S3-compatible store, of Google's or of Azure's: the home that many machines share."""

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

from kvstore_server.errors import Unavailable
from kvstore_server.storage.keys import check_key, is_key
from kvstore_server.storage.probe import prove_create_once
from kvstore_server.storage.store import Buffer, ObjectStore

PART_BYTES = 8 << 20
"""A larger object is read in pieces of this size, several at a time."""
READERS = 8
CONNECT_SECONDS = 5.0
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.05, 1.0
_REFUSED = (PermissionDeniedError, UnauthenticatedError, NotSupportedError)
"""Asking again does not help."""
_BEYOND_THE_END = "416 Range Not Satisfiable"


class BucketStore(ObjectStore):
    """An ObjectStore in the bucket, and below the path, that `url` names: s3://, gs:// or az://.

    Credentials come from where the provider's own tools look: the environment, or the machine's identity. A request
    takes at most `request_seconds`; one that failed is tried again until `retry_seconds` have passed.
    """

    reads_at_once = 16

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        request_seconds: float = 20.0,
        retry_seconds: float = 60.0,
    ) -> None:
        self._retry_seconds = retry_seconds
        place = {"endpoint": endpoint, "region": region}
        self._store: Any = from_url(
            url,
            config=cast(Any, {name: value for name, value in place.items() if value}),
            client_options={
                "timeout": timedelta(seconds=request_seconds),
                "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, request_seconds)),
                "allow_http": endpoint is not None and urlsplit(endpoint).scheme == "http",
            },
            retry_config={
                "max_retries": 100,  # time is the bound
                "retry_timeout": timedelta(seconds=retry_seconds),
                "backoff": {
                    "init_backoff": timedelta(seconds=PAUSE_SECONDS),
                    "max_backoff": timedelta(seconds=PAUSE_SECONDS_MAX),
                    "base": 2,
                },
            },
        )
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="bucket")

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        """False also if an attempt whose answer was lost has created it: who finds the name taken reads what it has."""
        check_key(key)
        body = b"".join(parts)
        give_up = time.monotonic() + self._retry_seconds
        pause = PAUSE_SECONDS
        while True:
            try:
                with _bucket_errors(key):
                    obstore.put(self._store, key, body, mode="create", use_multipart=False)
                return True
            except AlreadyExistsError:
                if self._exists(key):  # a store may also answer so while a delete of that name is under way
                    return False
                failure = Unavailable("STORE_CONFLICT", "the object store neither has the object nor takes it")
            except Unavailable as error:
                if error.reason == "STORE_REFUSES":
                    raise
                failure = error
            if time.monotonic() + pause > give_up:
                raise failure
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(2 * pause, PAUSE_SECONDS_MAX)

    def get(self, key: str) -> memoryview:
        check_key(key)
        size, first = self._read_first(key, 0, PART_BYTES)
        whole = np.empty(size, np.uint8).data
        whole[: len(first)] = first

        def read(start: int) -> None:
            end = min(start + PART_BYTES, size)
            with _bucket_errors(key):
                whole[start:end] = obstore.get_range(self._store, key, start=start, end=end)

        for _ in self._readers.map(read, range(len(first), size, PART_BYTES)):
            pass
        return whole

    def get_range(self, key: str, start: int, end: int) -> memoryview:
        check_key(key)
        return self._read_first(key, start, end)[1]

    def list_keys(self, prefix: str, start_after: str = "") -> list[str]:
        with _bucket_errors(prefix):
            pages = obstore.list(self._store, prefix or None, offset=start_after or None, chunk_size=1000)
            keys = [entry["path"] for page in pages for entry in page]
        return sorted(key for key in keys if is_key(key))

    def list_folders(self, prefix: str) -> list[str]:
        with _bucket_errors(prefix):
            folders = obstore.list_with_delimiter(self._store, prefix or None)["common_prefixes"]
        return sorted(folder.rpartition("/")[2] for folder in folders if is_key(folder))

    def size(self, key: str) -> int:
        check_key(key)
        with _bucket_errors(key):
            return obstore.head(self._store, key)["size"]

    def delete(self, key: str) -> None:
        check_key(key)
        with contextlib.suppress(KeyError), _bucket_errors(key):
            obstore.delete(self._store, key)

    def probe(self) -> None:
        prove_create_once(self)

    def _exists(self, key: str) -> bool:
        try:
            self.size(key)
        except KeyError:
            return False
        return True

    def _read_first(self, key: str, start: int, end: int) -> tuple[int, memoryview]:
        """The object's size and its bytes [start, end) in memory of their own."""
        try:
            with _bucket_errors(key):
                result = obstore.get(self._store, key, options={"range": (start, end)})
                return result.meta["size"], memoryview(bytearray(result.bytes()))
        except Unavailable as error:
            if _BEYOND_THE_END not in str(error.__cause__):
                raise
            return self.size(key), memoryview(bytearray())


@contextlib.contextmanager
def _bucket_errors(key: str) -> Iterator[None]:
    """What the store says, in our words; AlreadyExistsError passes through."""
    try:
        yield
    except FileNotFoundError:
        raise KeyError(key) from None
    except AlreadyExistsError:
        raise
    except _REFUSED as error:
        raise Unavailable("STORE_REFUSES", "the object store refuses this server") from error
    except (BaseError, OSError) as error:
        raise Unavailable("STORE_UNAVAILABLE", "the object store does not answer") from error
