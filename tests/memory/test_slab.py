import random
from collections import Counter

import pytest

from kvstore_server.memory.slab import Slab, SlabFull

KIB = 1024


def slab(extents: int) -> Slab:
    return Slab(extents * 16 * KIB, extent_bytes=16 * KIB)


def test_pages_of_one_size_fill_an_extent_before_the_next_is_opened() -> None:
    two = slab(2)
    assert len(two.take_pages(5 * 512, 6)) == 6
    assert two.free_bytes == 16 * KIB
    with pytest.raises(SlabFull):
        two.take_pages(5 * 512, 7)
    assert len(two.take_pages(5 * 512, 6)) == 6
    assert two.free_bytes == 0


def test_an_extent_serves_another_size_once_its_pages_are_released() -> None:
    one = slab(1)
    small = one.take_pages(512, 32)
    with pytest.raises(SlabFull):
        one.take_pages(1024, 1)
    one.release(small)
    assert one.free_bytes == 16 * KIB
    assert one.take_run(16 * KIB) == (0, 16 * KIB)


def test_a_shared_page_stays_until_its_last_owner_leaves() -> None:
    one = slab(1)
    pages = one.take_pages(16 * KIB, 1)
    one.share(pages)
    one.release(pages)
    with pytest.raises(SlabFull):
        one.take_pages(512, 1)
    one.release(pages)
    assert one.take_pages(512, 1)


def test_a_run_needs_neighbouring_extents() -> None:
    three = slab(3)
    runs = [three.take_run(16 * KIB)[0] for _ in range(3)]
    three.release_run(runs[0])
    three.release_run(runs[2])
    with pytest.raises(SlabFull):
        three.take_run(17 * KIB)
    three.release_run(runs[1])
    assert three.take_run(48 * KIB) == (0, 48 * KIB)


def test_a_short_run_takes_a_page_of_a_power_of_two() -> None:
    one = slab(1)
    offset, length = one.take_run(1500)
    assert length == 2048
    assert len(one.take_pages(2048, 7)) == 7
    one.release_run(offset)
    assert one.take_pages(2048, 1) == [offset]


def test_pages_larger_than_an_extent_are_runs_and_a_refusal_takes_none() -> None:
    five = slab(5)
    with pytest.raises(SlabFull):
        five.take_pages(17 * KIB, 3)
    assert five.free_bytes == five.size_bytes
    pages = five.take_pages(17 * KIB, 2)
    assert sorted(pages) == [0, 32 * KIB]
    five.release(pages)
    assert five.free_bytes == five.size_bytes


@pytest.mark.parametrize("seed", range(20))
def test_no_two_owners_ever_hold_the_same_byte(seed: int) -> None:
    """Random taking, sharing and releasing against a map of owners by 512-byte unit."""
    rng, pool = random.Random(seed), slab(24)
    held: list[tuple[int, int, bool]] = []  # offset, bytes, is a run
    owners = Counter[int]()
    for _ in range(600):
        size = rng.choice((512, 1536, 5120, 16 * KIB, 20 * KIB))
        try:
            match rng.randrange(5):
                case 0:
                    held.append((*pool.take_run(size), True))
                case 1 | 2:
                    held += [(offset, size, False) for offset in pool.take_pages(size, rng.randrange(1, 6))]
                case 3 if held:
                    offset, size, run = held.pop(rng.randrange(len(held)))
                    pool.release_run(offset) if run else pool.release([offset])
                case _ if shared := [each for each in held if not each[2]]:
                    held.append(rng.choice(shared))
                    pool.share([held[-1][0]])
        except SlabFull:
            continue
        owners = Counter(
            unit for offset, size, _ in set(held) for unit in range(offset // 512, (offset + size + 511) // 512)
        )
        assert not owners or max(owners.values()) == 1
    for offset, _, run in held:
        pool.release_run(offset) if run else pool.release([offset])
    assert pool.free_bytes == pool.size_bytes
