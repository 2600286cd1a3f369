"""One tenant asks for a hundred times what each of nine others does: those keep what they had."""

import os
from pathlib import Path

import pytest

from .open_loop import CAPACITY, WHOLE_SUITE, Loaded, Outcomes, loaded

SECONDS = 40.0 if WHOLE_SUITE else 10.0
OTHERS = [f"tenant-{number}" for number in range(1, 10)]
HOG = "hog"
RATE = 0.7 * CAPACITY / (len(OTHERS) + 1)
"""Of each of the nine, a second: less than an equal share, which is all that it is owed."""
HOG_TIMES = 100
KEPT_MIN = 0.9
HOG_FIRST = f"tenants: {{{HOG}: {{weight: 1000}}}}"

pytestmark = pytest.mark.slow


def kept(alone: dict[str, Outcomes], beside: dict[str, Outcomes]) -> dict[str, float]:
    """Of each tenant's own throughput."""
    return {tenant: beside[tenant].goodput / alone[tenant].goodput for tenant in OTHERS}


async def measured(server: Loaded) -> dict[str, float]:
    rates = dict.fromkeys(OTHERS, RATE)
    alone = await server.drive(rates, SECONDS)
    beside = await server.drive({**rates, HOG: HOG_TIMES * RATE}, SECONDS)
    shares = kept(alone, beside)
    nine = [sum(each[tenant].goodput for tenant in OTHERS) for each in (alone, beside)]
    print(
        f"nine tenants: {nine[0]:.1f}/s alone, {nine[1]:.1f}/s beside one that asks for {HOG_TIMES}x "
        f"({beside[HOG].offered / SECONDS:.0f}/s, answered {beside[HOG].goodput:.1f}/s); each kept "
        f"{min(shares.values()):.3f} to {max(shares.values()):.3f}; capacity {CAPACITY:g}/s, "
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    return shares


async def test_nine_tenants_keep_their_throughput_beside_one_that_asks_for_a_hundred_times_as_much(
    tmp_path: Path,
) -> None:
    async with loaded(tmp_path, [*OTHERS, HOG]) as server:
        shares = await measured(server)
    assert min(shares.values()) >= KEPT_MIN


async def test_a_server_that_favours_one_tenant_is_found(tmp_path: Path) -> None:
    async with loaded(tmp_path, [*OTHERS, HOG], HOG_FIRST) as server:
        shares = await measured(server)
    assert min(shares.values()) < KEPT_MIN
