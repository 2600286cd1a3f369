"""What `make soak` measures over minutes, over seconds: a leak rises, and noise does not."""

import random
from pathlib import Path

import pytest

from .main import Plan, soak
from .picture import draw, table
from .slopes import ALLOWED, slopes


def gauges(rises: dict[str, float], minutes: int = 20) -> tuple[list[float], dict[str, list[float]]]:
    """Every gauge at 100 and some noise, and those of `rises` so much higher at the end, after a warm-up."""
    chance, seconds = random.Random(1), [float(second) for second in range(0, minutes * 60, 5)]
    series = {
        gauge: [
            100 - max(0.0, 60 - at / 5) + rises.get(gauge, 0.0) * at / seconds[-1] + chance.gauss(0, 0.5)
            for at in seconds
        ]
        for gauge in ALLOWED
    }
    return seconds, series


def test_noise_and_a_warm_up_are_flat() -> None:
    seconds, series = gauges({})
    assert all(each.flat for each in slopes(seconds, series, 300))
    assert not all(each.flat for each in slopes(seconds, series, 0)), "the warm-up itself is a rise"


@pytest.mark.parametrize("gauge", ALLOWED)
def test_a_rise_beyond_what_is_allowed_is_found_in_its_gauge(gauge: str) -> None:
    found = slopes(*gauges({gauge: 2 * ALLOWED[gauge] + 2}), 300)
    assert [each.gauge for each in found if not each.flat] == [gauge]
    assert [line for line in table(found) if "RISES" in line]


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="say nothing"):
        slopes(*gauges({}), warm_seconds=20 * 60 - 10)


@pytest.mark.slow
async def test_sessions_that_are_never_deleted_are_found_in_half_a_minute(tmp_path: Path) -> None:
    found = await soak(Plan(minutes=0.5, warm_minutes=0.1, leak=True), tmp_path)
    risen = {each.gauge for each in found.slopes if not each.flat}
    assert {"sessions", "rows in memory, MiB"} & risen, table(found.slopes)
    draw(tmp_path / "soak.png", found.title, found.seconds, found.series, 6)
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
