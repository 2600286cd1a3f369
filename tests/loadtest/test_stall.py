"""A server that stands still for two seconds: the open loop sees it, a closed loop does not."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from kvstore_client import AsyncKVStoreClient, ModelShape
from kvstore_codecs.spec import RAW

from ..running import ServerProcess, server_process

pytest.importorskip("hdrh", reason="the loadtest extra is not installed")

from kvstore_client.loadtest.checking import expected_of
from kvstore_client.loadtest.open_loop import Operation, send
from kvstore_client.loadtest.operations import Asking
from kvstore_client.loadtest.tally import Tally
from kvstore_client.loadtest.vectors import queries

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=2, head_dim=32, dtype="float16", sm_scale=0.2)
STALL_SECONDS = 2.0
ARRIVALS = [(number, 0.02 * number) for number in range(300)]


async def send_closed(
    arrivals: Sequence[tuple[int, float]], operation: Callable[[int], Operation], tally: Tally
) -> float:
    """The planted mistake: the next request waits for the answer before, and latency counts from the sending."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for number, offset in arrivals:
        await asyncio.sleep(max(0.0, begun + offset - loop.time()))
        sent = loop.time()
        done = await operation(number).run(number, sent)
        tally.answered(operation(number).kind, offset, loop.time() - sent, done)
    return loop.time() - begun


async def p99_of(server: ServerProcess, sender: Callable) -> float:
    tally = Tally()
    async with AsyncKVStoreClient(server.target) as client:
        session = await client.create_session("s", SHAPE, RAW)
        k, v = torch.randn(2, 1, 64, 1, 32).half()
        await session.append(k, v, start=0) if not session.length else None
        rows = queries(SHAPE, 0, 4)
        expected = await expected_of(session, rows, top_k=0, attends=True, timeout=60)
        asking = Asking(session, rows, expected, top_k=1, timeout=30)
        load = asyncio.create_task(sender(ARRIVALS, lambda _: Operation("attend", asking.attend), tally))
        await asyncio.sleep(1.0)
        server.pause()
        await asyncio.sleep(STALL_SECONDS)
        server.go_on()
        await load
    assert (tally.all.answered, tally.facts["wrong"]) == (len(ARRIVALS), 0)
    return tally.all.percentile(99)


@pytest.mark.slow
async def test_a_stall_of_the_server_is_in_p99_and_a_closed_loop_would_miss_it(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        seen = await p99_of(server, send)
        missed = await p99_of(server, send_closed)
    assert STALL_SECONDS * 0.9 < seen < STALL_SECONDS * 1.5
    assert missed < STALL_SECONDS * 0.25
