"""Ten times as many calls as the device can answer: it goes on answering as many as it can, and refuses at once."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from .open_loop import CAPACITY, REFUSAL_SECONDS_MAX, WHOLE_SUITE, Loaded, Outcomes, loaded

FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0) if WHOLE_SUITE else (1.0, 10.0)
SECONDS = 15.0 if WHOLE_SUITE else 5.0
GOODPUT_SHARE_MIN = 0.8
GROWTH_BYTES_MAX = 64 << 20
RECOVERY_SECONDS = 2.0
HEALTH_SECONDS_MAX = 2.0
TENANT = "one"
NO_BOUNDS = f"limits: {{queries_inflight_max: {1 << 40}, device_waiting_max: {1 << 40}}}"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Seen:
    phases: dict[float, Outcomes]
    """By the share of the capacity that was asked for."""
    recovered: Outcomes
    """At half the capacity, from RECOVERY_SECONDS after the overload on."""
    quick_refusals: int
    refusals: int
    growth_bytes: int
    health_seconds: float

    def complaints(self) -> list[str]:
        overload = self.phases[max(self.phases)]
        goodput, peak = overload.goodput, max(each.goodput for each in self.phases.values())
        refused = overload.codes["RESOURCE_EXHAUSTED"]
        wrong = {
            f"goodput {goodput:.1f}/s is less than {GOODPUT_SHARE_MIN:.0%} of {peak:.1f}/s": goodput
            < GOODPUT_SHARE_MIN * peak,
            f"{overload.codes} are other codes than OK and RESOURCE_EXHAUSTED": overload.codes["OK"] + refused
            < overload.offered,
            f"{refused - overload.hinted} of {refused} refusals do not say when to come again": overload.hinted
            < refused,
            f"only {self.quick_refusals} of {self.refusals} refusals took at most {REFUSAL_SECONDS_MAX} s": (
                self.quick_refusals < 0.99 * self.refusals
            ),
            f"the server grew by {self.growth_bytes / 2**20:.0f} MiB": self.growth_bytes > GROWTH_BYTES_MAX,
            f"after it {self.recovered.codes}": self.recovered.codes["OK"] < self.recovered.offered,
            f"health took {self.health_seconds:.2f} s": self.health_seconds > HEALTH_SECONDS_MAX,
        }
        return [text for text, holds in wrong.items() if holds]

    def show(self) -> None:
        for factor, each in self.phases.items():
            late = sorted(each.latencies)[int(0.99 * len(each.latencies))] if each.latencies else float("nan")
            print(
                f"{factor:4g}x: offered {each.offered / each.seconds:6.1f}/s, goodput {each.goodput:5.1f}/s, "
                f"p99 of answers {late:.2f} s, {dict(each.codes)}"
            )
        print(
            f"refusals within {REFUSAL_SECONDS_MAX * 1000:g} ms at the server: {self.quick_refusals:,} of "
            f"{self.refusals:,}; memory {self.growth_bytes / 2**20:+.1f} MiB; slowest health check "
            f"{self.health_seconds * 1000:.0f} ms; {RECOVERY_SECONDS:g} s later {dict(self.recovered.codes)}; "
            f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )


async def overload(server: Loaded, factors: tuple[float, ...]) -> Seen:
    phases: dict[float, Outcomes] = {}
    health: list[float] = []
    await server.drive({TENANT: CAPACITY / 2}, 1.0)
    before = peak = server.resident_bytes
    for factor in factors:
        running = asyncio.create_task(server.drive({TENANT: factor * CAPACITY}, SECONDS))
        while not (await asyncio.wait({running}, timeout=0.25))[0]:
            health.append(await server.health_seconds())
            peak = max(peak, server.resident_bytes)
        phases[factor] = running.result()[TENANT]
    await asyncio.sleep(RECOVERY_SECONDS)
    recovered = (await server.drive({TENANT: CAPACITY / 2}, 3.0))[TENANT]
    quick, refusals = await asyncio.to_thread(server.refusals_within, REFUSAL_SECONDS_MAX)
    return Seen(phases, recovered, quick, refusals, peak - before, max(health))


async def test_overload_costs_no_goodput(tmp_path: Path) -> None:
    async with loaded(tmp_path, [TENANT]) as server:
        seen = await overload(server, FACTORS)
    seen.show()
    assert not seen.complaints()


async def test_a_server_without_admission_is_found(tmp_path: Path) -> None:
    async with loaded(tmp_path, [TENANT], NO_BOUNDS, ADMIT_ALL="1") as server:
        seen = await overload(server, (1.0, 10.0))
    seen.show()
    assert any("goodput" in complaint for complaint in seen.complaints())
