from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from kvstore_client.demo.messages import Agreement, Answered, Compared, Continued, Prefilled
from kvstore_client.demo.table import Outcome, broken_promises, table_of
from kvstore_client.demo.text import SharedText

GOOD = Outcome(
    text=SharedText("a text", "...", ("Who?", "Why?"), is_default=True),
    prefilled=Prefilled(tokens=3000, fp16_bytes=1000, stored_bytes=290, prefill_seconds=9.0, append_seconds=1.0),
    begun=Answered("The first", 2, 1.0, [0.001] * 60),
    other=Answered("Because [x]", 3, 1.0, [0.002] * 90),
    continued=Continued(Answered("The first and the rest", 3, 0.5, [0.001] * 90), attention_moved=0.0),
    restart_seconds=2.0,
    compared=Compared(
        raw=Agreement(positions=256, agreeing=255, decisive=255, decisive_agreeing=255, kl=1e-9),
        lossy=Agreement(positions=256, agreeing=248, decisive=255, decisive_agreeing=248, kl=0.004),
    ),
)
BAD_RAW = replace(GOOD.compared.raw, decisive_agreeing=254)
BAD_LOSSY = replace(GOOD.compared.lossy, agreeing=230, kl=0.02)


def test_the_table_shows_what_was_measured() -> None:
    written = StringIO()
    Console(width=200, file=written).print(table_of(GOOD))
    shown = written.getvalue()
    expected = ("0.290 of fp16", "p50 1.00 ms, p99 2.00 ms", "255 of 255", "0.9688", "KL 0.00400", "2.0 + 3.0", "6.0")
    for text in (*expected, "The first | server killed and restarted |  and the rest", "Because [x]", "3,000 tokens"):
        assert text in shown
    assert "NOT REACHED" not in shown
    assert broken_promises(GOOD) == []


@pytest.mark.parametrize(
    ("outcome", "promise"),
    [
        (replace(GOOD, compared=replace(GOOD.compared, raw=BAD_RAW)), "raw session agrees"),
        (replace(GOOD, continued=replace(GOOD.continued, attention_moved=1e-4)), "answers as before"),
        (replace(GOOD, prefilled=replace(GOOD.prefilled, stored_bytes=330)), "stored bytes"),
    ],
)
def test_a_broken_promise_is_named(outcome: Outcome, promise: str) -> None:
    (broken,) = broken_promises(outcome)
    assert promise in broken
    assert table_of(outcome).row_count == table_of(GOOD).row_count + 1


def test_only_the_default_text_promises_quality() -> None:
    worse = replace(GOOD, compared=replace(GOOD.compared, lossy=BAD_LOSSY))
    assert len(broken_promises(worse)) == 2
    assert broken_promises(replace(worse, text=replace(GOOD.text, is_default=False))) == []
