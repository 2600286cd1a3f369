"""Every kind of store, and parsing that is remembered for tests that open thousands of them."""

from collections.abc import Callable, Generator, Hashable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvstore_server.storage import commit_log, log_reader, log_view, merging, meta_log
from kvstore_server.storage.bucket import BucketStore
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.local import LocalStore
from kvstore_server.storage.segment import Segment, write_segment
from kvstore_server.storage.store import Buffer

from ..s3_server import S3Server, s3_server
from . import inputs
from .explorer import Objects
from .memory_store import CountedStore, MemoryStore


def _by_content(parse: Callable[..., Any]) -> Callable[..., Any]:
    @cache
    def parsed(data: bytes, *place: Hashable) -> Any:
        try:
            return parse(data if parse is not log_reader.read_header else memoryview(data), *place), None
        except Exception as error:
            return None, error

    def remembered(data: bytes | memoryview, *place: Hashable) -> Any:
        value, error = parsed(bytes(data), *place)
        if error is not None:
            raise error
        return value

    return remembered


@pytest.fixture
def parse_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_log, "read_record", _by_content(meta_log.read_record))
    monkeypatch.setattr(log_reader, "read_header", _by_content(log_reader.read_header))
    monkeypatch.setattr(log_view, "inspect_segment", _by_content(log_view.inspect_segment))


@pytest.fixture(scope="session")
def s3() -> Generator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["memory", "local", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return CountedStore(LocalStore(tmp_path))
    s3: S3Server = request.getfixturevalue("s3")
    return CountedStore(BucketStore(s3.bucket(), endpoint=s3.endpoint))


@pytest.fixture
def log(store: MemoryStore) -> CommitLog:
    return inputs.commit_log(store)


@pytest.fixture
def one_append(parse_once: None, monkeypatch: pytest.MonkeyPatch) -> Objects:
    """A session with one append, and segments that are written once."""
    written: dict[tuple[Any, ...], list[Buffer]] = {}

    def write_once(segment: Segment) -> list[Buffer]:
        key = (segment.header.identity, segment.header.digest, segment.header.previous_digest)
        return written.setdefault(key, [b"".join(write_segment(segment))])

    monkeypatch.setattr(commit_log, "write_segment", write_once)
    monkeypatch.setattr(merging, "write_segment", write_once)
    store = MemoryStore()
    log = inputs.commit_log(store)
    inputs.append(log, inputs.created(log), seed=50)
    return store.objects
