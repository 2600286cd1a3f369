"""Processes that share a disk."""

import contextlib
import threading
from pathlib import Path

from kvstore_server.errors import (
    AlreadyExists,
)
from kvstore_server.storage.local import LocalStore

from .inputs import (
    commit_log,
    created,
    loaded,
    next_segment,
)


def test_two_racing_writers_fill_a_log_with_one_winner_each(tmp_path: Path) -> None:
    LocalStore(tmp_path)
    created(commit_log(LocalStore(tmp_path)))
    results: list[tuple[int, int]] = []

    def write(worker: int) -> None:
        log = commit_log(LocalStore(tmp_path))
        state = loaded(log)
        while state.length < 30:
            start = state.length
            with contextlib.suppress(AlreadyExists):
                log.commit(state, next_segment(log, state, seed=worker))
                results.append((start, worker))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    log = commit_log(LocalStore(tmp_path))
    state = loaded(log)
    winners = dict(results)
    assert len(winners) == len(results) == state.length
    for entry in log.appends(state):
        digest = next_segment(log, state, seed=winners[entry.start]).header.digest
        assert log.read(state, entry).header.digest == digest


def test_two_writers_of_equal_bytes_are_both_right(tmp_path: Path) -> None:
    created(commit_log(LocalStore(tmp_path)))
    barrier = threading.Barrier(2)
    results: list[str] = []

    def write() -> None:
        log = commit_log(LocalStore(tmp_path))
        state = loaded(log)
        for seed in range(20):
            segment = next_segment(log, state, seed=seed)
            barrier.wait(30)
            results.append(type(log.commit(state, segment)).__name__)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 40
    assert results.count("Committed") == results.count("AlreadyPresent") == 20
