from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kvstore_client import AsyncKVStoreClient, Session

from ..running import serving

pytest.importorskip("hdrh", reason="the demo extra is not installed")

from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.main import measure
from kvstore_client.loadtest.slo import Slo
from kvstore_client.loadtest.tally import Tally
from kvstore_client.loadtest.workers import AttendWorker, queries


async def test_a_load_is_answered_measured_and_cleaned_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        load = Load(f"127.0.0.1:{server.port}", tokens=300, workers=3, rate=60, seconds=1.0)
        result = await measure(load, [Slo.parse("p50=10s"), Slo.parse("p50=1us")], Console(quiet=True))
        async with AsyncKVStoreClient(load.target) as client:
            left = await client.list_sessions()
    assert (result.answered, result.errors, result.mismatched) == (round(result.offered_rate), {}, 0)
    assert result.verified >= 1
    assert result.slos == {"p50=10s": True, "p50=1us": False}
    assert left == []


class FickleSession:
    """Each answer differs a little from the one before."""

    shape = Load("localhost:1").shape

    def __init__(self, step: float) -> None:
        self._step, self._answers = step, 0

    def pin(self) -> "FickleSession":
        return self

    async def attend(self, layer: int, q: torch.Tensor, *, timeout: float) -> tuple[torch.Tensor, torch.Tensor]:
        self._answers += 1
        return q.float() + self._answers * self._step, q.float().sum(-1)


@pytest.mark.parametrize(("step", "mismatched"), [(0.0, 0), (1e-5, 1)])
async def test_a_query_asked_twice_must_get_one_answer(step: float, mismatched: int) -> None:
    tally, session = Tally(), FickleSession(step)
    asked: Any = session
    typed: Session = asked
    worker = AttendWorker(typed, queries(session.shape, 0), 1.0, tally)
    for number in range(3):
        await worker.request(number)
    await worker.finish()
    assert (tally.verified, tally.mismatched) == (1, mismatched)
