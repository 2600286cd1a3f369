"""`make soak`: a server under mixed load for long, and whether what it holds stays flat. Exit code 1 if it does not."""

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from ..program import free_port
from ..running import ServerProcess
from .gauges import sample
from .load import Load
from .picture import draw, table
from .slopes import Slope, slopes

SETTINGS = {
    "KVSTORE__MERGE__OBJECTS_MIN": "4",
    "KVSTORE__SWEEP_SECONDS": "2",
    "KVSTORE__GC_GRACE_SECONDS": "20",
    "KVSTORE__QUALITY__EXACT_BYTES_MAX": str(8 << 20),
}
"""So that what takes hours elsewhere comes to a balance within minutes."""
SAMPLES = 400


@dataclass(frozen=True)
class Plan:
    minutes: float
    warm_minutes: float
    """Sessions that expire, and the grace of what is deleted, take about two to come to a balance."""
    leak: bool = False


@dataclass
class Soak:
    """What was measured: at `seconds` the values of `series`."""

    plan: Plan
    load: Load
    seconds: list[float] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def slopes(self) -> list[Slope]:
        return slopes(self.seconds, self.series, self.plan.warm_minutes * 60)

    @property
    def title(self) -> str:
        done = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.load.operations.items()))
        total = f"{self.load.operations.total():,} operations in {self.seconds[-1] / 60:.1f} minutes"
        return f"{total}\n{done}"

    def add(self, at: float, values: dict[str, float]) -> None:
        self.seconds.append(at)
        for gauge, value in values.items():
            self.series.setdefault(gauge, []).append(value)


async def soak(plan: Plan, folder: Path) -> Soak:
    """Raises what the load or the server's end meets."""
    port = free_port()
    server = ServerProcess(folder / "data", "--metrics", f"127.0.0.1:{port}", env=SETTINGS)
    try:
        found = Soak(plan, Load(server.target, leak=plan.leak))
        stop, began = asyncio.Event(), monotonic()
        running = asyncio.create_task(found.load.run(stop))
        interval = plan.minutes * 60 / SAMPLES
        while (at := monotonic() - began) < plan.minutes * 60 and not running.done():
            values = await asyncio.to_thread(sample, server.pid, f"http://127.0.0.1:{port}/metrics", folder / "data")
            found.add(at, values)
            if len(found.seconds) % (SAMPLES // 10) == 0:
                print(f"{at / 60:5.1f} of {plan.minutes:g} minutes: {_line(values)}", flush=True)
            await asyncio.wait({running}, timeout=interval)
        stop.set()
        await asyncio.wait_for(running, 60)
        found.exit_code = server.terminate()
    finally:
        if server.running:
            server.kill()
    assert found.exit_code == 0, f"the server ended with {found.exit_code}"
    return found


def _line(values: dict[str, float]) -> str:
    return ", ".join(f"{gauge} {value:,.0f}" for gauge, value in values.items())


def main() -> int:
    options = argparse.ArgumentParser(prog="make soak ARGS=...", description=__doc__)
    options.add_argument("--minutes", type=float, default=20.0)
    options.add_argument("--warm-minutes", type=float, help="before slopes are measured; default: a quarter")
    options.add_argument("--out", type=Path, default=Path("build/soak.png"), help="the picture")
    options.add_argument("--leak", action="store_true", help="a planted fault: sessions are never deleted")
    given = options.parse_args()
    plan = Plan(given.minutes, given.minutes / 4 if given.warm_minutes is None else given.warm_minutes, given.leak)
    with tempfile.TemporaryDirectory(prefix="kvstore-soak-") as folder:
        found = asyncio.run(soak(plan, Path(folder)))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(given.out, found.title, found.seconds, found.series, plan.warm_minutes * 60)
    print(found.title, *table(found.slopes), f"picture: {given.out}", sep="\n")
    return 0 if all(each.flat for each in found.slopes) else 1


if __name__ == "__main__":
    sys.exit(main())
