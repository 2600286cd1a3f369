"""Small objects become one, at every reader's own time; no append is lost, moved or taken twice on the way."""

from dataclasses import replace

import pytest
import torch

from kvstore_server.errors import Aborted, AlreadyExists, DataLoss
from kvstore_server.storage import merging
from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.merged_segment import merged_segment
from kvstore_server.storage.merging import MergeBounds, Merger
from kvstore_server.storage.meta import MergedRange
from kvstore_server.storage.segment import Segment, write_segment
from kvstore_server.storage.store import Buffer
from kvstore_server.storage.verify import verify_store

from .facts import facts_of
from .inputs import (
    CLOCK_SECONDS,
    SHAPE,
    TENANT,
    append,
    assert_equal_rows,
    commit_log,
    created,
    loaded,
    log_key,
    next_segment,
    random_fit,
    three_appends,
)
from .memory_store import MemoryStore

GRACE_SECONDS = 100.0
BOUNDS = MergeBounds(objects_min=2, object_bytes_max=1 << 20)
FIRST = "000000000000"


def merge(store: MemoryStore, name: str = "a", bounds: MergeBounds = BOUNDS) -> MergedRange | None:
    state = loaded(commit_log(store), name)
    return Merger(store, TENANT, bounds, lambda: CLOCK_SECONDS).merge(state)


def collect(store: MemoryStore, session: str = "a", later_seconds: float = GRACE_SECONDS) -> int:
    return Collector(store, TENANT, GRACE_SECONDS, lambda: CLOCK_SECONDS + later_seconds).collect(session)


def objects(store: MemoryStore) -> list[str]:
    """Where appends lie: log names by their position, merged objects by their number."""
    keys = [key.split("/")[-2:] for key in store.objects if "/log/" in key or "/merged/" in key]
    return sorted(f"{folder} {int(name[:12])}" for folder, name in keys)


def test_merged_appends_are_what_they_were_for_every_reader(log: CommitLog, store: MemoryStore) -> None:
    state = three_appends(log)
    before, entries = facts_of(store), log.appends(state)
    segments = [log.read(state, entry) for entry in entries]
    merged = merge(store)
    assert merged
    assert (merged.start, merged.end) == (0, 6)
    assert facts_of(store) == before
    found = loaded(commit_log(store))
    whole = log.read(found, log.appends(found)[1])
    assert_equal_rows(whole, merged_segment(segments, 0.0))
    assert [e.key for e in log.appends(found)] == [f"default/a/{FIRST}/merged/{merged.name}.safetensors"] * 3
    assert sum(e.stored_bytes for e in log.appends(found)) == merged.stored_bytes
    assert merged.stored_bytes == len(store.objects[log.appends(found)[0].key])
    plain = [replace(e, key="", merged=None, stored_bytes=0) for e in log.appends(found)]
    assert plain == [replace(e, key="", stored_bytes=0) for e in entries]
    assert verify_store(store).damaged == []


def test_only_appends_of_one_epoch_are_merged(log: CommitLog, store: MemoryStore) -> None:
    """Their sketches have other words: of the second epoch three, of the first one."""
    state = created(log)
    for seed, (epoch, fit) in enumerate([(0, None), (0, 0), (0, None), (1, 1), (1, None), (1, None), (2, 2)]):
        made = None if fit is None else random_fit(SHAPE, seed=fit)
        widths = (3, 1) if epoch else (1, 1)
        log.commit(state, next_segment(log, state, 2, seed=seed, widths=widths, fit=made, epoch=epoch))
    before = [(e.epoch, e.fit_range, e.digest) for e in log.appends(state)]
    found = [merge(store), merge(store), merge(store)]
    assert [(each.start, each.end) for each in found if each] == [(0, 6), (6, 12)]
    again = loaded(commit_log(store))
    entries = log.appends(again)
    assert [(e.epoch, e.fit_range, e.digest) for e in entries] == before
    assert [log.read(again, entries[place]).fit for place in (0, 3, 6)] == [random_fit(SHAPE, seed=n) for n in range(3)]
    assert [log.read(again, entries[place]).header.epoch for place in (0, 3, 6)] == [0, 1, 2]
    assert verify_store(store).damaged == []
    with pytest.raises(ValueError, match="several fits"):
        merged_segment([log.read(again, entries[0]), log.read(again, entries[3])], 0.0)


def test_replaced_objects_go_after_the_grace_and_a_reader_who_knows_only_them_goes_on(
    log: CommitLog, store: MemoryStore
) -> None:
    three_appends(log)
    old = loaded(log)
    before = facts_of(store)
    merge(store)
    assert collect(store, later_seconds=GRACE_SECONDS - 1) == 0
    assert collect(store) == 3
    assert objects(store) == ["merged 1"]
    assert facts_of(store) == before
    entries = list(old.entries or [])
    for entry in entries:
        assert log.read(old, entry).header.tokens == 6
    assert isinstance(append(log, old, 2, seed=9), Committed)
    assert [e.end for e in log.appends(loaded(log))] == [2, 4, 6, 8]
    assert verify_store(store).damaged == []


def test_a_writer_who_missed_the_merging_neither_wins_a_free_name_nor_is_believed(
    log: CommitLog, store: MemoryStore
) -> None:
    state = created(log)
    append(log, state, 2, seed=0)
    late, later = loaded(log), loaded(log)
    append(log, state, 2, seed=1)
    before = facts_of(store)
    merge(store)
    collect(store)
    with pytest.raises(AlreadyExists):
        append(log, late, 2, seed=7)
    assert "log 2" in objects(store)
    assert facts_of(store) == before
    assert isinstance(append(log, later, 2, seed=1), AlreadyPresent)
    assert log.appends(later) == log.appends(late) == log.appends(loaded(log))
    assert collect(store) == 1
    assert objects(store) == ["merged 1"]


def test_what_a_late_writer_left_is_no_damage_to_a_reader_who_slept_as_long(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    append(log, state, 2, seed=0)
    late = loaded(log)
    append(log, state, 2, seed=1)
    slept = log.load("a")
    assert slept
    merge(store)
    collect(store)
    append(log, loaded(log), 2, seed=2)
    with pytest.raises(AlreadyExists):
        append(log, late, 3, seed=7)
    assert objects(store) == ["log 2", "log 4", "merged 1"]
    assert log.appends(slept) == log.appends(loaded(log))


def test_appends_are_recognised_after_they_were_merged(log: CommitLog, store: MemoryStore) -> None:
    state = three_appends(log)
    merge(store)
    collect(store)
    for known in (state, loaded(log)):
        for seed in range(3):
            present = log.already_present(known, 2 * seed, 2, log.appends(known)[seed].digest)
            assert isinstance(present, AlreadyPresent)
        for start, tokens in ((0, 6), (1, 1), (2, 1)):
            with pytest.raises(AlreadyExists):
                log.already_present(known, start, tokens, log.appends(known)[0].digest)


def test_forks_share_merged_objects_before_and_after(log: CommitLog, store: MemoryStore) -> None:
    parent = three_appends(log)
    early, _ = log.fork(parent, 3, "b")
    append(log, early, 2, seed=8)
    merge(store)
    collect(store)
    late, _ = log.fork(loaded(log), 5, "c")
    append(log, late, 1, seed=9)
    log.delete("a")
    created(log)
    for state, shared in ((early, 3), (loaded(log, "b"), 3), (late, 5), (loaded(log, "c"), 5)):
        ends = [entry.end for entry in log.appends(state)]
        assert ends == [*range(2, shared, 2), shared, shared + (2 if shared == 3 else 1)]
        for entry in log.appends(state):
            log.read(state, entry)
    assert collect(store, later_seconds=1e6) == 0
    assert verify_store(store).damaged == []


def test_the_fit_block_hashes_and_exact_tokens_stay_those_of_their_appends(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    hashes = [bytes([n]) * 32 for n in range(3)]
    log.commit(state, next_segment(log, state, 4, exact=4, block_hashes=(hashes[0],), block_tokens=4))
    fit = random_fit(SHAPE, bases=(1, 2))
    log.commit(state, next_segment(log, state, 8, seed=1, fit=fit, block_hashes=tuple(hashes[1:]), block_tokens=4))
    append(log, state, 1, seed=2)
    entries = log.appends(state)
    merge(store)
    found = loaded(log)
    assert [(e.fit_range, list(e.blocks())) for e in log.appends(found)] == [
        (e.fit_range, list(e.blocks())) for e in entries
    ]
    read = log.read(found, log.appends(found)[1])
    assert read.fit == fit
    assert (read.header.fit_append, read.header.geometry.exact) == (1, 4)
    for seed in range(3, 6):
        append(log, found, 12, seed=seed)
    merge(store, bounds=MergeBounds(objects_min=4, object_bytes_max=1 << 20))
    again = loaded(log)
    assert [(e.fit_range, e.block_hashes) for e in log.appends(again)[:3]] == [
        (e.fit_range, e.block_hashes) for e in entries
    ]
    assert log.read(again, log.appends(again)[0]).header.fit_append == 1


def test_before_the_fit_every_layer_is_rows_and_merges_with_what_came_after(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    dense = next_segment(log, state, 3, exact=3, widths=None)
    log.commit(state, dense)
    signs = next_segment(log, state, 2, seed=1)
    log.commit(state, signs)
    for seed in range(4):
        append(log, state, 2, seed=seed)
    merge(store)
    whole = log.read(loaded(log), log.appends(loaded(log))[0])
    rows, expected = whole.of(1, "keys"), signs.of(1, "keys")
    assert torch.equal(rows.rows, dense.of(1, "keys").rows)
    assert rows.signs
    assert expected.signs
    assert torch.equal(rows.signs.words[:2], expected.signs.words)
    assert torch.equal(whole.of(0, "keys").rows[:5], torch.cat([dense.of(0, "keys").rows, signs.of(0, "keys").rows]))


def test_attributes_and_checkpoints_keep_each_other(log: CommitLog, store: MemoryStore) -> None:
    state = three_appends(log)
    log.update(state, ttl_seconds=5.0, pinned=True)
    merge(store)
    found = loaded(log)
    assert (found.ttl_seconds, found.pinned, len(found.merged)) == (5.0, True, 1)
    log.update(state, ttl_seconds=None, pinned=False)
    assert state.merged == found.merged
    assert loaded(log) == state
    assert log.expire("a", FIRST, lambda now: now.ttl_seconds is None) == FIRST
    expired = log.expired("a", FIRST, GRACE_SECONDS)
    assert expired
    assert [entry.end for entry in log.appends(expired)] == [2, 4, 6]
    log.read(expired, log.appends(expired)[0])


def test_a_merge_that_lost_its_number_leaves_nothing(
    log: CommitLog, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_appends(log)

    def overtaken(segment: Segment) -> list[Buffer]:
        log.update(loaded(log), ttl_seconds=1.0, pinned=False)
        return write_segment(segment)

    monkeypatch.setattr(merging, "write_segment", overtaken)
    assert merge(store) is None
    assert objects(store) == ["log 0", "log 2", "log 4"]
    monkeypatch.undo()
    assert merge(store)


def test_what_a_merger_that_died_left_goes_with_the_next_checkpoint(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    left = f"default/a/{FIRST}/merged/000000000001-dead.safetensors"
    store.objects[left] = b"left"
    assert collect(store) == 0
    merge(store)
    assert collect(store) == 4
    assert left not in store.objects


def test_a_session_that_ends_while_it_is_merged_stays_ended(log: CommitLog, store: MemoryStore) -> None:
    state = three_appends(log)
    log.delete("a")
    with pytest.raises(Aborted):
        Merger(store, TENANT, BOUNDS, lambda: CLOCK_SECONDS).merge(state)
    merge_left = objects(store)
    assert merge_left == ["log 0", "log 2", "log 4"]
    created(log)
    assert collect(store) == 3


def test_damage_in_a_merged_object_is_named_and_stays_in_it(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    merged = merge(store)
    assert merged
    collect(store)
    key = f"default/a/{FIRST}/merged/{merged.name}.safetensors"
    append(log, loaded(log), 2, seed=9)
    whole = store.objects[key]
    for place in (30, len(whole) - 1):
        store.objects[key] = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        assert [str(each) for each in verify_store(store).damaged]
        state = loaded(log)
        assert state.length == 8
        with pytest.raises(DataLoss):
            log.read(state, log.appends(state)[0])
        log.read(state, log.appends(state)[-1])
        with pytest.raises(DataLoss) if place == 30 else pytest.raises(AlreadyExists):
            log.already_present(state, 2, 2, "0" * 64)
    del store.objects[key]
    assert [(e.start, e.end, e.damage) for e in log.appends(loaded(log))] == [(0, 6, "missing"), (6, 8, "")]
    assert len(verify_store(store).damaged) == 1


def test_a_merged_object_is_none_under_another_name(log: CommitLog, store: MemoryStore) -> None:
    state = three_appends(log)
    merged = merge(store)
    assert merged
    key = f"default/a/{FIRST}/merged/{merged.name}.safetensors"
    plain = store.objects[log_key(0)]
    store.objects[log_key(6)] = store.objects[key]
    with pytest.raises(DataLoss):
        log.discover(state)
    store.objects[key] = plain
    assert log.appends(loaded(log))[0].damage


def test_objects_are_written_again_only_when_they_at_least_double(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    bounds = MergeBounds(objects_min=4, object_bytes_max=1 << 20)
    written = 0
    for seed in range(200):
        append(log, state, seed=seed)
        while merged := Merger(store, TENANT, bounds, lambda: CLOCK_SECONDS).merge(state):
            written += merged.end - merged.start
            log.superseded(state)
    assert [entry.end for entry in log.appends(loaded(log))] == list(range(1, 201))
    collect(store)
    assert len(objects(store)) <= 12
    assert written <= 200 * 7
    assert facts_of(store)["a"].appends == tuple((n, n + 1, e.digest) for n, e in enumerate(log.appends(state)))


def test_one_object_holds_no_more_than_its_bound(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    for seed in range(12):
        append(log, state, 16, seed=seed)
    size = log.appends(state)[0].stored_bytes
    bounds = MergeBounds(objects_min=3, object_bytes_max=5 * size)
    sizes = []
    while merged := merge(store, bounds=bounds):
        sizes.append(merged.stored_bytes)
    assert len(sizes) == 3
    assert max(sizes) <= 5 * size
    collect(store)
    assert len(objects(store)) == 3
