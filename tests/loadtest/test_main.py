from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from kvstore_client import AsyncKVStoreClient

from ..running import serving

pytest.importorskip("hdrh", reason="the loadtest extra is not installed")

from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.main import measure
from kvstore_client.loadtest.result import Result
from kvstore_client.loadtest.slo import Slo

TRACE = """\
{"timestamp": 27000, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 3]}
{"timestamp": 27400, "input_length": 1500, "output_length": 9, "hash_ids": [1, 2, 4]}
{"timestamp": 90000, "input_length": 100, "output_length": 1, "hash_ids": [9]}
"""


async def measured(folder: Path, slos: tuple[str, ...] = (), **settings: object) -> tuple[Result, list[str]]:
    """The result, and what it left on the server."""
    async with serving(folder / "data") as server:
        load = Load(**{"targets": (f"127.0.0.1:{server.port}",), "model": "2x1x2x32", "tokens": 300, **settings})
        found = await measure(load, [Slo.parse(text) for text in slos], Console(quiet=True))
        async with AsyncKVStoreClient(load.targets[0]) as client:
            return found[0], [info.name for info in await client.list_sessions()]


async def test_a_load_of_two_processes_is_answered_checked_and_cleaned_up(tmp_path: Path) -> None:
    slos = ("p50=10s", "p50=1us", "attend:p99=10s", "append:p99=10s")
    result, left = await measured(tmp_path, slos, workers=3, processes=2, rate=60.0, seconds=1.0)
    sent = round(result.offered_rate)
    assert (result.total.answered, result.total.refused, result.total.failed) == (sent, 0, {})
    assert (result.facts["checked"], result.facts.get("wrong", 0)) == (sent, 0)
    assert sum(moment.answered for moment in result.moments) == sent
    assert result.slos == {"p50=10s": True, "p50=1us": False, "attend:p99=10s": True, "append:p99=10s": False}
    layer_bytes = 300 * 2 * 32 * 2
    assert result.raw_bytes_per_second * result.seconds == pytest.approx(sent * layer_bytes)
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "kinds"),
    [
        ("ingest", {"append"}),
        ("private", {"attend"}),
        ("retrieval", {"top_k"}),
        ("mixed", {"append", "attend", "top_k"}),
    ],
)
async def test_every_scenario_checks_what_it_does(tmp_path: Path, scenario: str, kinds: set[str]) -> None:
    result, left = await measured(
        tmp_path, scenario=scenario, workers=2, rate=40.0, seconds=1.0, append_tokens=32, top_k=8, codec="raw"
    )
    assert {row.kind for row in result.rows} == kinds | {"all"}
    assert result.total.failed == {}
    assert result.facts["checked"] >= (2 if scenario == "ingest" else result.total.answered - 10)
    assert result.passed
    assert left == []


@pytest.mark.slow
async def test_a_trace_finds_the_prefixes_that_it_appended(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(TRACE)
    result, left = await measured(
        tmp_path, scenario="trace", trace=file, trace_block_tokens=256, workers=2, seconds=2.0, codec="raw"
    )
    answered = Counter({row.kind: row.answered for row in result.rows})
    assert answered == {"prompt": 2, "step": 2 * 3, "all": 8}
    assert result.facts["prompt_tokens"] == 550 + 750
    assert result.facts["matched_tokens"] == 512
    assert (result.facts["checked"], result.passed, left) == (1, True, [])


@pytest.mark.slow
async def test_replicas_are_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    load = Load((), scenario="failover", model="2x1x2x32", tokens=300, workers=2, rate=10.0, seconds=10.0)
    result, _, _ = await measure(load, [], Console(quiet=True))
    assert result.kills[0].replica == 0
    assert result.total.answered == round(10 * result.offered_rate)
    assert result.passed
