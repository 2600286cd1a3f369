"""Workers here are `methodcaller`s on their pipe: all that a fresh interpreter can find without this file."""

from operator import methodcaller

import pytest

from kvstore_client.demo.messages import Agreement, Compared, Progress
from kvstore_client.demo.processes import WorkerFailed, WorkerProcess, results

PERFECT = Agreement(positions=1, agreeing=1, decisive=1, decisive_agreeing=1, kl=0.0)
RESULT = Compared(PERFECT, PERFECT)


def test_results_failures_deaths_and_silence_are_told_apart() -> None:
    calls = {"good": ("send", RESULT), "broken": ("nonsense",), "dead": ("send", Progress("prefill", 1, 2))}
    workers = {name: WorkerProcess(name, methodcaller(*call)) for name, call in calls.items()}
    shown: list[tuple[str, Progress]] = []

    def outcome(name: str, seconds: float = 60.0) -> object:
        return results([workers[name]], Compared, seconds, lambda *seen: shown.append(seen))

    try:
        with pytest.raises(WorkerFailed, match="good: no result in 0 s"):
            outcome("good", seconds=0.0)
        assert outcome("good") == [RESULT]
        with pytest.raises(WorkerFailed, match=r"broken: Traceback[^$]*'nonsense'"):
            outcome("broken")
        with pytest.raises(WorkerFailed, match="dead ended without a result"):
            outcome("dead")
        assert shown == [("dead", Progress("prefill", 1, 2))]
    finally:
        for worker in workers.values():
            worker.end()
