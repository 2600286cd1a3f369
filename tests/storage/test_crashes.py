"""A power cut after any store operation, whatever it leaves of what was not synced, loses nothing acknowledged."""

import functools
import random
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from kvstore_server.errors import KVStoreError
from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.local import LocalStore
from kvstore_server.storage.merging import MergeBounds, Merger
from kvstore_server.storage.session_state import SessionState

from ..faults.tally import TALLY, times
from .facts import Found, facts_of
from .inputs import CLOCK_SECONDS, SHAPE, SPEC, TENANT, append, commit_log, next_segment
from .memory_disk import MemoryDisk, Tree

ROOT = "/srv/data"
WORST = (("dropped", "none"), ("dropped", "all"), ("garbage", "all"), ("dropped", "removed"))
Facts = dict[str, Found]
Run = Callable[[MemoryDisk], Iterator[None]]
"""Makes calls on a new store on the disk and yields after each acknowledgement; the same every time."""

pytestmark = pytest.mark.usefixtures("parse_once")


class ProcessEnded(BaseException):
    """Stands for the end of the process."""


class Lost(AssertionError):
    """A power cut left what no order of the calls explains."""


def end_process(reason: str) -> NoReturn:
    raise ProcessEnded(reason)


def opened(disk: MemoryDisk) -> LocalStore:
    return LocalStore(ROOT, files=disk, fatal=end_process, reserve=False)


def facts_on(tree: Tree) -> Facts:
    return facts_of(opened(MemoryDisk(tree)))


def living(log: CommitLog, name: str) -> SessionState:
    state = log.load(name)
    assert state
    return state


def merge(store: LocalStore, name: str) -> None:
    merger = Merger(store, TENANT, MergeBounds(objects_min=2, object_bytes_max=1 << 20), lambda: CLOCK_SECONDS)
    merger.merge(living(commit_log(store), name))


def collect(store: LocalStore, name: str) -> None:
    """Without any grace."""
    Collector(store, TENANT, 0.0, lambda: CLOCK_SECONDS).collect(name)


def staged_in_turn(log: CommitLog, state: SessionState) -> Iterator[None]:
    """Two appends whose objects are both written before the first is committed."""
    first = next_segment(log, state, 2, seed=30)
    after = first.header.start, first.header.digest
    second = next_segment(log, state, 2, seed=31, start=first.header.end, after=after)
    for segment, staged in [(each, log.stage(each)) for each in (first, second)]:
        assert isinstance(log.commit(state, segment, staged), Committed)
        yield


def every_call(disk: MemoryDisk) -> Iterator[None]:
    """Every kind of call; yields after each acknowledgement."""
    log = commit_log(opened(disk))
    yield
    parent, _ = log.create("parent", SHAPE, SPEC)
    yield
    for seed in range(3):
        append(log, parent, tokens=2, seed=seed)
        yield
    yield from staged_in_turn(log, parent)
    log.create("beside", SHAPE, SPEC, ttl_seconds=5)
    yield
    append(log, living(log, "beside"), seed=7)
    yield
    child, _ = log.fork(parent, 3, "child")
    yield
    append(log, child, seed=8)
    yield
    log.update(parent, ttl_seconds=60, pinned=True)
    yield
    for seed in range(2):
        store = opened(disk)
        merge(store, "parent")
        yield
        collect(store, "parent")
        yield
        append(log, parent, tokens=9, seed=20 + seed)
        yield
    log.delete("parent")
    yield
    log = commit_log(opened(disk))  # a restart
    again, _ = log.create("parent", SHAPE, SPEC)
    yield
    append(log, again, seed=9)
    yield
    log.fork(living(log, "child"), 4, "grandchild")
    yield
    append(log, living(log, "child"), tokens=2, seed=10)
    yield
    log.delete("beside")
    yield
    store = opened(disk)
    merge(store, "child")
    yield
    for name in ("child", "parent", "beside"):
        collect(store, name)
        yield


def random_calls(seed: int) -> Run:
    """Sixteen calls on three names in any order that may succeed."""

    def run(disk: MemoryDisk) -> Iterator[None]:
        source = random.Random(seed)
        log = commit_log(opened(disk))
        yield
        for number in range(16):
            name = source.choice("abc")
            state = log.load(name)
            if state is None:
                log.create(name, SHAPE, SPEC)
            else:
                match source.randrange(10):
                    case 0:
                        log.delete(name)
                    case 1:
                        log.update(state, ttl_seconds=number + 1, pinned=source.random() < 0.5)
                    case 2 if len(free := [n for n in "abc" if n != name and log.load(n) is None]) > 0:
                        log.fork(state, source.randint(0, log.discover(state)), free[0])
                    case 3:
                        log = commit_log(opened(disk))  # a restart
                    case 4:
                        merge(opened(disk), name)
                    case 5:
                        collect(opened(disk), name)
                    case _:
                        append(log, state, tokens=source.randint(1, 3), seed=number)
            yield

    return run


def images(disk: MemoryDisk, source: random.Random) -> list[Tree]:
    """Different disks that a power cut may leave now: the extreme ones and some random ones."""
    choices = [*WORST, ("kept", "all"), ("zeros", "none"), *(("torn", "all"),) * 3]
    choices += [(source.choice(("dropped", "torn", "zeros", "garbage", "kept")), "some") for _ in range(12)]
    trees = (disk.power_cut(source, data=data, names=names) for data, names in choices)
    return [dict(tree) for tree in {frozenset(tree.items()) for tree in trees}]


def worst_images(disk: MemoryDisk, source: random.Random) -> list[Tree]:
    return [disk.power_cut(source, data=data, names=names) for data, names in WORST]


def expected_facts(run: Run) -> list[Facts]:
    """What is there after each acknowledgement when nothing goes wrong."""
    disk = MemoryDisk()
    return [{}, *(facts_on(disk.everything()) for _ in run(disk))]


class PowerCuts:
    """Runs calls on a disk and reopens what power cuts may leave of it after each change."""

    def __init__(self, disk: MemoryDisk, run: Run, expected: list[Facts], images: Callable[[], list[Tree]]) -> None:
        self.reopened = 0
        self._disk, self._run, self._expected, self._images = disk, run, expected, images
        self._acknowledged = 0

    def check_everywhere(self) -> None:
        """Lost if a disk has other facts than the acknowledged calls, with or without the one in flight, explain."""
        self._disk.changed = self._check
        for _ in self._run(self._disk):
            self._acknowledged += 1
            self._check()

    def check_around_the_lost_sync(self) -> None:
        """As check_everywhere, from the sync that is lost until two calls after it."""
        self._disk.changed = lambda _: self._check() if self._disk.lost else None
        calls_left = 2
        for _ in self._run(self._disk):
            self._acknowledged += 1
            if self._disk.lost:
                self._check()
                calls_left -= 1
            if not calls_left:
                return

    def _check(self, _: str = "") -> None:
        allowed = self._expected[self._acknowledged : self._acknowledged + 2]
        for tree in self._images():
            self.reopened += 1
            try:
                found = facts_on(tree)
            except (KVStoreError, KeyError) as error:
                raise Lost(f"after {self._acknowledged} acknowledgements: {error}") from error
            if found not in allowed:
                raise Lost(f"after {self._acknowledged} acknowledgements: {found}")


def test_no_power_cut_loses_or_invents_anything() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source = random.Random(seed)
    reopened = 0
    runs: list[Run] = [every_call]
    row = TALLY.row("power cut after a store operation, images")
    while reopened < times(10_000, 100_000):
        disk, run = MemoryDisk(), runs.pop()
        cuts = PowerCuts(disk, run, expected_facts(run), lambda disk=disk: images(disk, source))
        try:
            cuts.check_everywhere()
        except Lost:
            row.losses += 1
            raise
        finally:
            reopened += cuts.reopened
            row.cycles = row.operations = reopened
        runs.append(random_calls(source.randrange(2**32)))


def test_a_session_goes_on_after_any_power_cut() -> None:
    source = random.Random(4)
    disk = MemoryDisk()

    def check(_: str) -> None:
        log = commit_log(opened(MemoryDisk(disk.power_cut(source, data="torn", names="some"))))
        for name in log.sessions():
            state = log.load(name)
            if state is not None:
                before = log.discover(state)
                append(log, state, tokens=2, seed=20)
                assert log.discover(living(log, name)) == before + 2

    disk.changed = check
    for _ in every_call(disk):
        pass


def killed_after_link(disk: MemoryDisk, deaf_folder: str = "") -> Iterator[None]:
    """A writer is killed before it syncs a name; another process finds its object and answers for it."""
    log = commit_log(opened(disk))
    state, _ = log.create("a", SHAPE, SPEC)
    segment = next_segment(log, state, 2)
    yield
    disk.deaf_folder = deaf_folder
    changed = disk.changed

    def kill(call: str) -> None:
        changed(call)
        if call == "link":
            raise ProcessEnded

    disk.changed = kill
    with pytest.raises(ProcessEnded):
        log.commit(state, segment)
    disk.changed = changed
    log = commit_log(opened(disk))
    assert isinstance(log.commit(living(log, "a"), segment), AlreadyPresent)
    yield
    log.create("b", SHAPE, SPEC)
    yield


def test_what_another_process_left_unsynced_is_synced_before_it_is_acknowledged() -> None:
    expected = expected_facts(killed_after_link)
    disk, source = MemoryDisk(), random.Random(1)
    PowerCuts(disk, killed_after_link, expected, lambda: images(disk, source)).check_everywhere()

    session = f"{ROOT}/default/a"
    for folder in (session, f"{session}/000000000000", f"{session}/000000000000/log"):
        run = functools.partial(killed_after_link, deaf_folder=folder)
        disk = MemoryDisk()
        with pytest.raises(Lost):
            PowerCuts(disk, run, expected, lambda disk=disk: worst_images(disk, source)).check_everywhere()


def loses(run: Run, expected: list[Facts], lost_sync: int) -> bool | None:
    """Whether the worst power cuts show that one sync did nothing; None if it had nothing to do."""
    disk, source = MemoryDisk(lost_sync=lost_sync), random.Random(lost_sync)
    cuts = PowerCuts(disk, run, expected, lambda: worst_images(disk, source))
    try:
        cuts.check_around_the_lost_sync()
    except Lost:
        return True
    return False if disk.lost else None


def test_every_sync_that_has_something_to_do_is_needed_and_its_absence_is_found() -> None:
    disk = MemoryDisk()
    for _ in every_call(disk):
        pass
    expected = expected_facts(every_call)
    found = [loses(every_call, expected, number) for number in range(disk.syncs)]
    assert found.count(False) == 0
    assert found.count(True) > 50
