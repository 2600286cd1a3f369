"""A name counts as durable only after a sync that began when the name was there."""

import pytest

from kvstore_server.storage import durable_names
from kvstore_server.storage.durable_names import DurableNames


def test_a_name_seen_while_a_sync_runs_is_not_covered_by_it() -> None:
    synced: list[str] = []

    def sync(folder: str) -> None:
        synced.append(folder)
        if len(synced) == 1:
            names.note("/r", ["late"])

    names = DurableNames("/r", sync)
    names.note("/r", ["early"])
    names.settle("/r/x")
    names.settle("/r/early")
    assert synced == ["/r"]
    names.settle("/r/late")
    assert synced == ["/r", "/r"]


def test_a_failed_sync_makes_nothing_durable() -> None:
    attempts: list[str] = []

    def sync(folder: str) -> None:
        attempts.append(folder)
        raise OSError("no sync")

    names = DurableNames("/r", sync)
    for _ in range(2):
        with pytest.raises(OSError, match="no sync"):
            names.settle("/r/a/x")
    assert attempts == ["/r/a", "/r/a"]
    assert not names.contains_folder("/r/a")


def test_what_is_forgotten_for_room_is_only_synced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_names, "NAMES_MAX", 8)
    synced: list[str] = []
    names = DurableNames("/r", synced.append)
    for number in range(100):
        names.settle(f"/r/{number}")
        names.note("/r", [f"{number}.{i}" for i in range(3)])
    assert synced == ["/r"] * 100
    names.settle("/r/0")
    assert len(synced) == 101
