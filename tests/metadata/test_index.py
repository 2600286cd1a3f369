"""What every index does, in memory or in Redis."""

import asyncio
import random

import pytest

from kvstore_server.metadata.index import (
    PREFIX_CANDIDATES,
    Holdings,
    Index,
    Notice,
    PrefixEntry,
    ReplicaEntry,
)

from .entries import census, entry


async def names(index: Index, **query: object) -> list[str]:
    return [e.name for e in await index.list("default", **{"limit": 1000, **query})]  # pyright: ignore[reportArgumentType]


async def test_what_was_put_comes_back(index: Index) -> None:
    kept = entry(ttl_seconds=1.5, pinned=True, last_used_unix_seconds=1234.5678)
    assert await index.put(kept)
    assert await index.get("default", "a") == kept
    assert await index.list("default", limit=10) == [kept]


async def test_an_unknown_session_or_tenant_is_absent(index: Index) -> None:
    assert await index.get("default", "a") is None
    assert await index.list("other", limit=10) == []
    await index.remove("default", "a", "1")
    await index.touch("default", "a", 5.0)
    assert await index.list("default", limit=10) == []


@pytest.mark.parametrize("later", [entry(length=11), entry(generation=2, length=0), entry(generation=10, length=1)])
async def test_an_entry_never_goes_back(index: Index, later) -> None:
    assert await index.put(entry())
    assert await index.put(later)
    assert not await index.put(entry())
    assert await index.get("default", "a") == later


async def test_the_same_length_again_may_change_attributes(index: Index) -> None:
    await index.put(entry(pinned=False))
    assert await index.put(entry(pinned=True))
    found = await index.get("default", "a")
    assert found
    assert found.pinned


async def test_puts_in_any_order_end_at_the_latest(index: Index) -> None:
    seed = random.randrange(2**32)
    puts = [entry(generation=g, length=n) for g in (1, 2) for n in range(12)]
    random.Random(seed).shuffle(puts)
    await asyncio.gather(*(index.put(e) for e in puts))
    assert await index.get("default", "a") == entry(generation=2, length=11), f"{seed=}"


async def test_a_removed_session_is_gone_and_a_late_put_does_not_bring_it_back(index: Index) -> None:
    await index.put(entry(generation=3))
    await index.remove("default", "a", "3")
    assert await index.get("default", "a") is None
    assert await names(index) == []
    assert not await index.put(entry(generation=3, length=99))
    assert not await index.put(entry(generation=2, length=99))
    assert await names(index) == []


async def test_a_name_can_be_used_again_after_a_removal(index: Index) -> None:
    await index.remove("default", "a", "3")
    assert await index.put(entry(generation=4, length=0))
    assert await names(index) == ["a"]


async def test_removing_an_earlier_generation_leaves_the_later_one(index: Index) -> None:
    await index.put(entry(generation=5))
    await index.remove("default", "a", "4")
    assert await index.get("default", "a") == entry(generation=5)
    await index.remove("default", "a", "5")
    await index.remove("default", "a", "1")
    assert not await index.put(entry(generation=5))


async def test_sessions_are_listed_by_name_in_pages(index: Index) -> None:
    all_names = sorted([f"s{i}" for i in range(25)] + ["S", "t", "s.x", "s-", "s_"])
    for name in reversed(all_names):
        await index.put(entry(name))
    assert await names(index) == all_names
    with_s = [n for n in all_names if n.startswith("s")]
    paged, after = [], ""
    while page := await names(index, prefix="s", after=after, limit=7):
        assert len(page) <= 7
        paged += page
        after = page[-1]
    assert paged == with_s


@pytest.mark.parametrize(
    ("prefix", "after", "expected"),
    [
        ("b", "", ["b", "b1", "b2"]),
        ("b", "a", ["b", "b1", "b2"]),
        ("b", "b", ["b1", "b2"]),
        ("b1", "", ["b1"]),
        ("b", "b2", []),
        ("b", "c", []),
        ("z", "", []),
        ("", "b2", ["c"]),
    ],
)
async def test_prefix_and_after_meet(index: Index, prefix: str, after: str, expected: list[str]) -> None:
    for name in ("a", "b", "b1", "b2", "c"):
        await index.put(entry(name))
    assert await names(index, prefix=prefix, after=after) == expected


async def test_tenants_do_not_see_each_other(index: Index) -> None:
    await index.put(entry(tenant="one", length=1))
    await index.put(entry(tenant="two", length=2))
    await index.remove("one", "a", "1")
    assert await index.get("one", "a") is None
    assert [e.length for e in await index.list("two", limit=10)] == [2]


async def test_last_use_moves_forward_only_and_survives_a_put(index: Index) -> None:
    await index.put(entry())
    for when in (2000.25, 1500.0):
        await index.touch("default", "a", when)
    await index.put(entry(length=20))
    found = await index.get("default", "a")
    assert found == entry(length=20, last_used_unix_seconds=2000.25)


async def test_a_last_use_does_not_outlive_its_session(index: Index) -> None:
    await index.put(entry())
    await index.touch("default", "a", 9000.0)
    await index.remove("default", "a", "1")
    await index.put(entry(generation=2))
    assert await index.get("default", "a") == entry(generation=2)


async def test_clear_forgets_every_tenant_and_every_removal(index: Index) -> None:
    await index.put(entry(tenant="one"))
    await index.put(entry(tenant="two"))
    await index.remove("one", "a", "7")
    await index.clear()
    assert await index.list("one", limit=10) == await index.list("two", limit=10) == []
    assert await index.put(entry(tenant="one", generation=1))


async def test_every_subscriber_hears_what_is_published_while_it_listens(index: Index) -> None:
    notices = [Notice(tenant="default", session="a", generation="1", length=n) for n in range(3)]
    await index.publish(notices[0])
    async with index.subscribe() as first, index.subscribe() as second:
        for notice in notices[1:]:
            await index.publish(notice)
        for subscriber in (first, second):
            async with asyncio.timeout(5):
                assert [await anext(subscriber) for _ in notices[1:]] == notices[1:]
    await index.publish(notices[0])


async def test_ping_answers(index: Index) -> None:
    await index.ping()


def prefix(session: str, end: int = 256, generation: int = 1) -> PrefixEntry:
    return PrefixEntry(session=session, generation=f"{generation:012d}", end=end)


async def test_prefixes_are_found_by_label_for_each_tenant(index: Index) -> None:
    a, b = "a" * 64, "b" * 64
    await index.put_prefixes("default", [(a, prefix("s")), (b, prefix("s", 512)), (a, prefix("t"))])
    await index.put_prefixes("other", [(b, prefix("u"))])
    found = await index.find_prefixes("default", [b, "c" * 64, a])
    assert [sorted(entry.session for entry in entries) for entries in found] == [["s"], [], ["s", "t"]]
    assert list(found[0]) == [prefix("s", 512)]
    await index.put_prefixes("default", [(a, prefix("s", generation=2))])
    await index.drop_prefix("default", a, "t")
    await index.drop_prefix("default", "d" * 64, "t")
    assert list((await index.find_prefixes("default", [a]))[0]) == [prefix("s", generation=2)]


async def test_of_many_sessions_with_one_prefix_some_are_found(index: Index) -> None:
    await index.put_prefixes("default", [("a" * 64, prefix(f"s{number}")) for number in range(600)])
    (found,) = await index.find_prefixes("default", ["a" * 64])
    assert len(found) == PREFIX_CANDIDATES


async def test_more_labels_than_one_call_takes_are_all_asked(index: Index) -> None:
    labels = [f"{number:064x}" for number in range(1200)]
    await index.put_prefixes("default", [(label, prefix("s", end)) for end, label in enumerate(labels)])
    found = await index.find_prefixes("default", labels)
    assert [entry.end for (entry,) in found] == list(range(1200))


def replica(name: str, seen: float) -> ReplicaEntry:
    return ReplicaEntry(name=name, version="1", device="cpu", state="serving", seen_unix_seconds=seen)


async def test_servers_that_were_not_seen_for_long_are_forgotten(index: Index) -> None:
    for each in (replica("b:1", 1000.0), replica("a:1", 1290.0), replica("gone:1", 900.0)):
        await index.announce(each)
    await index.announce(replica("b:1", 1200.0))
    assert await index.replicas() == [replica("a:1", 1290.0), replica("b:1", 1200.0)]
    await index.announce(replica("a:1", 5000.0))
    assert await index.replicas() == [replica("a:1", 5000.0)]
    await index.clear()
    assert list(await index.replicas()) == []


async def test_the_census_that_was_put_last_comes_back_older(index: Index) -> None:
    assert await index.census() is None
    await index.put_census(census(taken_by="another", tenants={}))
    await index.put_census(census())
    await asyncio.sleep(0.1)
    found = await index.census()
    assert found
    assert 2.1 <= found.age_seconds < 30
    assert found == census(age_seconds=found.age_seconds)
    assert found.total == Holdings(sessions=4, tokens=30, stored_bytes=3000, raw_bytes=12000)
    await index.clear()
    assert await index.census() is None


async def test_a_census_is_kept_for_its_time(index: Index) -> None:
    await index.put_census(census(kept_seconds=0.1))
    await asyncio.sleep(0.2)
    assert await index.census() is None
