import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("hdrh", reason="the demo extra is not installed")

from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.report import result_of, table_of, write_json
from kvstore_client.loadtest.slo import Slo
from kvstore_client.loadtest.tally import Tally
from kvstore_codecs.spec import DEFAULT


def tally_of(answers: int, failures: int) -> Tally:
    """Latencies 1 ms, 2 ms, ..."""
    tally = Tally()
    for number in range(answers):
        tally.record((number + 1) * 1e-3)
    tally.errors["UNAVAILABLE"] += failures
    return tally


def test_percentiles_are_of_the_latencies_to_three_digits() -> None:
    tally = tally_of(1000, 0)
    assert tally.percentile(50) == pytest.approx(0.5, rel=2e-3)
    assert tally.percentile(99.9) == pytest.approx(0.999, rel=2e-3)


def test_a_failed_request_counts_as_never_answered() -> None:
    tally = tally_of(95, 5)
    assert tally.percentile(95) == pytest.approx(0.095, rel=2e-3)
    assert tally.percentile(50) == pytest.approx(0.050, rel=2e-2)
    assert tally.percentile(96) == float("inf")
    assert Tally().percentile(50) == tally_of(0, 3).percentile(50) == float("inf")


@pytest.mark.parametrize(("text", "percent", "seconds"), [("p99=20ms", 99, 0.02), ("p99.9=1.5s", 99.9, 1.5)])
def test_bounds_are_read(text: str, percent: float, seconds: float) -> None:
    slo = Slo.parse(text)
    assert (slo.percent, slo.seconds) == (percent, pytest.approx(seconds))


@pytest.mark.parametrize("text", ["p99", "99=20ms", "p99=20", "p99=-1ms", "p100=1s", "p99=20 ms"])
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a bound such as p99=20ms"):
        Slo.parse(text)


def test_the_result_passes_only_with_every_bound_kept_and_no_answer_changed(tmp_path: Path) -> None:
    load, kept, missed = Load("localhost:1"), Slo.parse("p50=60ms"), Slo.parse("p99=20ms")

    def result(tally: Tally, *slos: Slo):
        return result_of(load, tally, device="cpu", codec=DEFAULT, sent=100, elapsed_seconds=10, slos=list(slos))

    tally = tally_of(95, 5)
    assert result(tally, kept).passed
    assert not result(tally, kept, missed).passed
    assert not result(tally_of(0, 3)).passed
    tally.mismatched = 1
    assert not result(tally, kept).passed

    write_json(result(tally, kept, missed), tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["percentiles"]["p99"] is None
    assert document["errors"] == {"UNAVAILABLE": 5}
    assert document["slos"] == {"p50=60ms": True, "p99=20ms": False}
    assert (document["load"]["rate"], document["passed"]) == (load.rate, False)
    written = StringIO()
    Console(width=120, file=written).print(table_of(result(tally, kept, missed)))
    for text in ("UNAVAILABLE 5", "never: too many failed", "MISSED", "planes=4"):
        assert text in written.getvalue()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "gpt-9"}, "not one of smollm2-135m"),
        ({"rate": 0}, "rate must be above 0"),
        ({"workers": -1}, "workers"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused_by_field(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Load("localhost:1", **changes)
