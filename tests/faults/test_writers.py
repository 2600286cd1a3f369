"""Several writers of one session through two servers, answers that are lost, and histories that must have an order."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path
from time import monotonic

import pytest
import torch
from torch import Tensor

from kvstore_client import AlreadyExists, AsyncKVStoreClient, KVStoreError, OutOfRange, Session
from kvstore_client.retry import Retry
from kvstore_codecs.spec import RAW, ModelShape

from ..running import serving
from .linearizable import Operation, State, is_linearizable
from .proxy import Proxy, proxied
from .tally import TALLY, times

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=1, head_dim=32, dtype="float16", sm_scale=0.2)
ONE_TRY = Retry(attempts=1)
QUICK = Retry(base_delay_seconds=0.005, max_delay_seconds=0.05)


def token(piece: str) -> tuple[Tensor, Tensor]:
    """One token whose values spell the piece: a number."""
    rows = torch.full((1, 1, 1, 32), float(piece)).half()
    return rows, rows


async def pieces(session: Session, end: int | None = None) -> State:
    keys, _ = await session.fetch(end=end)
    assert bool((keys == keys[..., :1]).all())
    return tuple(str(int(value)) for value in keys[0, :, 0, 0])


@asynccontextmanager
async def two_servers(folder: Path) -> AsyncIterator[tuple[str, str]]:
    async with serving(folder, staleness_seconds=0.05) as one, serving(folder, staleness_seconds=0.05) as two:
        yield f"127.0.0.1:{one.port}", f"127.0.0.1:{two.port}"


def seeded() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


async def test_of_two_writers_at_one_position_one_wins_or_both_are_equal(tmp_path: Path) -> None:
    chance, row = seeded(), TALLY.row("two writers race through two servers")
    async with (
        two_servers(tmp_path) as (one, two),
        AsyncKVStoreClient(one) as left,
        AsyncKVStoreClient(two) as right,
    ):
        for number in range(times(4, 40)):
            name, expected = f"s{number}", list[str]()
            writers = [await client.create_session(name, SHAPE, RAW) for client in (left, right)]
            for start in range(50):
                values = [str(chance.randrange(1000)), str(chance.randrange(1000))]
                values[1] = chance.choice(values)
                calls = [w.append(*token(v), start=start) for w, v in zip(writers, values, strict=True)]
                results = await asyncio.gather(*calls, return_exceptions=True)
                won = [value for value, result in zip(values, results, strict=True) if result == start + 1]
                lost = [isinstance(result, AlreadyExists) for result in results]
                assert len(set(won)) == 1, results
                assert len(won) + sum(lost) == 2, results
                expected.append(won[0])
                row.cycles += 1
            for client in (left, right):
                found = await pieces(await client.open_session(name))
                row.losses += found != tuple(expected)
                row.operations += len(expected)
    assert row.losses == 0


async def test_appends_whose_answers_are_lost_are_there_once(tmp_path: Path) -> None:
    chance, row = seeded(), TALLY.row("answer of an append lost")
    async with (
        two_servers(tmp_path) as (one, _),
        proxied(one) as proxy,
        AsyncKVStoreClient(proxy.target, retry=QUICK) as client,
    ):
        expected: list[str] = []
        session = await client.create_session("s", SHAPE, RAW)
        while row.cycles < times(100, 1000):
            expected.append(str(chance.randrange(1000)))
            proxy.lose_answers()
            append = asyncio.create_task(session.append(*token(expected[-1]), start=len(expected) - 1))
            await asyncio.sleep(chance.uniform(0, 0.02))
            proxy.cut()
            assert await append == len(expected)
            row.cycles, row.operations = proxy.cuts, row.operations + 1
            if len(expected) % 50 == 0:
                found = await pieces(session)
                row.losses += found != tuple(expected)
    assert row.losses == 0


class Client:
    """Appends to and reads one session through a connection that breaks, and records what it saw."""

    def __init__(self, session: Session, chance: random.Random, history: list[Operation]) -> None:
        self._session, self._chance, self._history = session, chance, history
        self._known = 0

    async def run(self, operations: int) -> None:
        for _ in range(operations):
            kind = self._chance.choice(("append", "read"))
            piece = str(self._chance.randrange(1000)) if kind == "append" else ""
            expected, called = self._known, monotonic()
            answer = await (self._append(piece) if kind == "append" else self._read())
            returned = inf if answer is None else monotonic()
            self._history.append(Operation(called, returned, kind, expected, piece, answer))

    async def _append(self, piece: str) -> int | str | None:
        try:
            self._known = await self._session.append(*token(piece), start=self._known, timeout=5)
        except (AlreadyExists, OutOfRange) as error:
            self._known = int(error.facts["length"])
            return "refused"
        except KVStoreError as error:
            assert error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"), error  # noqa: PT017
            return None
        return self._known

    async def _read(self) -> State | None:
        """Everything there is now; a read that failed says nothing."""
        try:
            self._known = await self._session.refresh(timeout=5)
            return await pieces(self._session)
        except KVStoreError as error:
            assert error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"), error  # noqa: PT017
            return None


async def cut_now_and_then(proxies: list[Proxy], chance: random.Random) -> None:
    while True:
        await asyncio.sleep(chance.uniform(0, 0.1))
        proxy = chance.choice(proxies)
        if chance.random() < 0.5:
            proxy.lose_answers()
            await asyncio.sleep(0.01)
        proxy.cut()


async def recorded(name: str, clients: list[AsyncKVStoreClient], chance: random.Random) -> list[Operation]:
    history: list[Operation] = []
    await clients[-1].create_session(name, SHAPE, RAW)
    sessions = [await _opened(client, name) for client in clients]
    await asyncio.gather(*(Client(session, chance, history).run(6) for session in sessions))
    return history


async def _opened(client: AsyncKVStoreClient, name: str) -> Session:
    while True:
        try:
            return await client.open_session(name)
        except KVStoreError:
            await asyncio.sleep(0.01)


async def test_every_history_through_broken_connections_has_an_order(tmp_path: Path) -> None:
    chance, row = seeded(), TALLY.row("histories over connections that break")
    async with (
        two_servers(tmp_path) as (one, two),
        proxied(one) as left,
        proxied(two) as right,
        AsyncKVStoreClient(left.target, retry=ONE_TRY) as first,
        AsyncKVStoreClient(right.target, retry=ONE_TRY) as second,
        AsyncKVStoreClient(two) as third,
    ):
        cutting = asyncio.create_task(cut_now_and_then([left, right], chance))
        for number in range(times(100, 1000)):
            history = await recorded(f"h{number}", [first, second, third], chance)
            row.losses += not is_linearizable(history)
            row.cycles += 1
            row.operations += len(history)
        cutting.cancel()
    assert row.losses == 0
    assert left.cuts
    assert right.cuts


def test_a_planted_stale_read_is_found() -> None:
    fine = [
        Operation(0, 1, "append", 0, "5", 1),
        Operation(2, 9, "append", 1, "6", 2),
        Operation(3, 4, "read", 0, "", ("5", "6")),
        Operation(5, inf, "append", 2, "7", None),
        Operation(6, 7, "read", 0, "", ("5", "6", "7")),
    ]
    assert is_linearizable(fine)
    assert is_linearizable([*fine, Operation(8, 9, "append", 1, "6", 2)])
    for bad in (
        Operation(5, 6, "read", 0, "", ("5",)),
        Operation(8, 9, "read", 0, "", ("5", "6")),
        Operation(8, 9, "append", 1, "8", 2),
        Operation(8, 9, "append", 3, "8", 3),
    ):
        assert not is_linearizable([*fine, bad])


@pytest.mark.parametrize("stale_share", [0.2])
async def test_a_server_that_answers_from_an_older_length_is_found(tmp_path: Path, stale_share: float) -> None:
    """The same run, with reads that now and then leave out the newest piece: the planted bug of the checker."""
    chance = seeded()
    async with two_servers(tmp_path) as (one, two), AsyncKVStoreClient(one) as first, AsyncKVStoreClient(two) as second:
        found = 0
        for number in range(20):
            history = await recorded(f"h{number}", [first, second], chance)
            for place, operation in enumerate(history):
                if isinstance(operation.answer, tuple) and operation.answer and chance.random() < stale_share:
                    history[place] = operation._replace(answer=operation.answer[:-1])
            found += not is_linearizable(history)
    assert found
