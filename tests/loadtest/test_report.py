import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("hdrh", reason="the loadtest extra is not installed")

from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.report import page, picture, table_of, write_hdr_log
from kvstore_client.loadtest.result import Result, result_of, write_json
from kvstore_client.loadtest.slo import Slo
from kvstore_client.loadtest.tally import HIGHEST_MICROSECONDS, Done, Tally


def tally_of(answers: int, failures: int = 0, refusals: int = 0) -> Tally:
    """Latencies 1 ms, 2 ms, ... of requests that were due ten a second."""
    tally = Tally()
    for number in range(answers):
        tally.answered("attend", number / 10, (number + 1) * 1e-3, Done(100, 1000, right=True))
    for _ in range(failures):
        tally.failed("append", 0.0, "UNAVAILABLE")
    for _ in range(refusals):
        tally.failed("append", 0.0, "RESOURCE_EXHAUSTED")
    return tally


def result(tally: Tally, *slos: str) -> Result:
    load, parsed = Load(("localhost:1",)), [Slo.parse(text) for text in slos]
    facts = {"device": "cpu", "codec": "raw", "sent": 100, "elapsed_seconds": 10.0, "kills": []}
    return result_of(load, tally, slos=parsed, **facts)


def test_percentiles_are_of_the_latencies_to_three_digits() -> None:
    kind = tally_of(1000).all
    assert kind.percentile(50) == pytest.approx(0.5, rel=2e-3)
    assert kind.percentile(99.9) == pytest.approx(0.999, rel=2e-3)


def test_a_failed_request_counts_as_never_answered() -> None:
    kind = tally_of(95, 5).all
    assert kind.percentile(95) == pytest.approx(0.095, rel=2e-3)
    assert kind.percentile(50) == pytest.approx(0.050, rel=2e-2)
    assert kind.percentile(96) == float("inf")
    assert Tally().all.percentile(50) == tally_of(0, 3).all.percentile(50) == float("inf")


def test_tallies_of_processes_add_up_to_one() -> None:
    one, two = tally_of(20, 1), Tally.unpacked(tally_of(20, 0, 2).packed())
    one.add(two)
    assert (one.all.answered, one.all.errors.total(), one.facts["checked"]) == (40, 3, 40)
    assert one.intervals[0].answered == 20
    assert one.all.percentile(50) == pytest.approx(tally_of(20).all.percentile(50), rel=0.2)


@pytest.mark.parametrize(
    ("text", "kind", "percent", "seconds"), [("p99=20ms", "", 99, 0.02), ("top_k:p99.9=1.5s", "top_k", 99.9, 1.5)]
)
def test_bounds_are_read(text: str, kind: str, percent: float, seconds: float) -> None:
    slo = Slo.parse(text)
    assert (slo.kind, slo.percent, slo.seconds) == (kind, percent, pytest.approx(seconds))


@pytest.mark.parametrize("text", ["p99", "99=20ms", "p99=20", "p99=-1ms", "p100=1s", "p99=20 ms", ":p99=1s"])
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a bound such as p99=20ms"):
        Slo.parse(text)


def test_the_result_passes_only_with_every_bound_kept_and_no_answer_wrong() -> None:
    tally = tally_of(95, 5)
    assert result(tally, "p50=60ms", "attend:p99=100ms").passed
    assert not result(tally, "p50=60ms", "p99=20ms").passed
    assert not result(tally, "append:p50=1s").passed
    assert not result(tally_of(0, 3)).passed
    tally.check(right=False)
    assert not result(tally, "p50=60ms").passed


def test_the_table_and_the_json_say_what_was_refused_failed_and_wrong(tmp_path: Path) -> None:
    tally = tally_of(94, 4, 2)
    tally.check(right=False)
    found = result(tally, "p50=60ms", "p99=20ms")
    write_json(found, tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text())
    total = document["rows"][-1]
    assert (total["answered"], total["refused"], total["failed"]) == (94, 2, {"UNAVAILABLE": 4})
    assert (total["percentiles"]["p99"], document["slos"]) == (None, {"p50=60ms": True, "p99=20ms": False})
    assert (document["wire_bytes_per_second"], document["raw_bytes_per_second"]) == (940, 9400)
    assert (document["load"]["rate"], document["passed"]) == (50.0, False)
    written = StringIO()
    Console(width=140, file=written).print(table_of(found))
    for text in ("UNAVAILABLE 4", "never", "MISSED", "1 WRONG", "p99.9 ms"):
        assert text in written.getvalue()


def test_other_tools_read_the_log(tmp_path: Path) -> None:
    write_hdr_log(tally_of(100), 1_700_000_000.0, tmp_path / "load.hlog")
    together, intervals = HdrHistogram(1, HIGHEST_MICROSECONDS, 3), 0
    reader = HistogramLogReader(str(tmp_path / "load.hlog"), together)
    while (interval := reader.get_next_interval_histogram()) is not None:
        together.add(interval)
        intervals += 1
    reader.close()
    assert (intervals, together.get_total_count()) == (10, 100)
    assert together.get_value_at_percentile(50) == pytest.approx(50_000, rel=0.02)


def test_the_picture_is_a_png_and_the_page_needs_nothing_else() -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    found = result(tally_of(30, 2), "p50=60ms")
    assert picture(found).startswith(b"\x89PNG")
    text = page(found)
    for expected in ("data:image/png;base64,", "<td>attend</td><td>30</td>", "p50=60ms"):
        assert expected in text
    assert "http" not in text.replace("xmlns", "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "gpt-9"}, "not one of smollm2-135m"),
        ({"codec": "zip"}, "not one of raw"),
        ({"rate": 0}, "rate must be above 0"),
        ({"workers": -1}, "workers"),
        ({"processes": 9}, "more than workers"),
        ({"scenario": "chaos"}, "not one of ingest"),
        ({"scenario": "trace"}, "belong together"),
        ({"top_k": 5000}, "more than tokens"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused_by_field(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Load(("localhost:1",), **changes)
