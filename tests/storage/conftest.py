"""Stores in memory, and parsing that is remembered for tests that open thousands of them."""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import pytest

from kvstore_server.storage import commit_log, log_reader, meta_log
from kvstore_server.storage.commit_log import CommitLog

from . import inputs
from .memory_store import MemoryStore


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
    monkeypatch.setattr(commit_log, "inspect_segment", _by_content(commit_log.inspect_segment))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def log(store: MemoryStore) -> CommitLog:
    return inputs.commit_log(store)
