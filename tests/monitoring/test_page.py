from html.parser import HTMLParser
from time import time

import pytest

from kvstore_codecs.named import codec_named
from kvstore_server.metadata.index import ReplicaEntry
from kvstore_server.monitoring.history import History, Moment
from kvstore_server.monitoring.page import Replica, Session, render, sparkline
from kvstore_server.telemetry import Telemetry

REPLICA = Replica("1.2.3", "127.0.0.1:7700", "cpu", "local", "memory", time() - 7300)


class Words(HTMLParser):
    """Visible text, cell by cell; raises for tags that do not match."""

    VOID = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture
def telemetry() -> Telemetry:
    telemetry = Telemetry()
    telemetry.gauge("kvstore_sessions", "", lambda: 3)
    telemetry.gauge("kvstore_stored_bytes", "", lambda: 1 << 20)
    telemetry.gauge("kvstore_raw_bytes", "", lambda: 4 << 20)
    return telemetry


def page_of(telemetry: Telemetry, *sessions: Session) -> list[str]:
    history = History(telemetry.registry)
    history.note()
    with telemetry.call("Append"):
        pass
    with telemetry.call("TopK") as outcome:
        outcome.code = "DATA_LOSS"
    telemetry.step("OK", 0.002)
    telemetry.step("RESOURCE_EXHAUSTED", 0.002)
    telemetry.appended(codec_named("qjl/affine"), 100, 4000, 1000)
    telemetry.recalled("qjl/affine", 0.5)
    now = Moment.now(telemetry.registry)
    history.moments.append(Moment(history.moments[0].unix_seconds + 2, now.samples))
    return Words(render(REPLICA, "serving", history, sessions)).words


def test_everything_there_is_to_know_is_on_the_page(telemetry: Telemetry) -> None:
    words = page_of(telemetry, Session("book", 1000, 5 << 20, 20 << 20))
    text = " ".join(words)
    for expected in (
        "kvstore 1.2.3 on cpu:  serving",
        "up 2 h",
        "Append 1 0.5",
        "DATA_LOSS 1 0",
        "RESOURCE_EXHAUSTED 0 1",
        "store 3 1.0 MiB 0.250",
        "qjl/affine 100 1000 B 0.250 – 0.5000",
        "book 1,000 5.0 MiB 0.250",
    ):
        assert expected in text, text


def test_other_replicas_are_on_the_page(telemetry: Telemetry) -> None:
    history = History(telemetry.registry)
    history.note()
    seen = history.moments[-1].unix_seconds - 7
    other = ReplicaEntry(name="b:7700", version="1", device="cuda:0", state="draining", seen_unix_seconds=seen)
    text = " ".join(Words(render(REPLICA, "serving", history, replicas=[other])).words)
    assert "b:7700 draining cuda:0 1 7 s ago" in text


def test_a_name_cannot_write_html(telemetry: Telemetry) -> None:
    name = "<script>alert(1)</script>"
    assert name in page_of(telemetry, Session(name, 1, 1, 1))


def test_a_server_that_has_just_started_has_a_page() -> None:
    history = History(Telemetry().registry)
    history.note()
    assert Words(render(REPLICA, "serving", history, ())).words[-1] == "none"


def test_a_sparkline_has_gaps_where_nothing_was_measured() -> None:
    nan = float("nan")
    assert sparkline([1, 2, nan, 2]).count("<polyline") == 2
    assert 'points="0,15.0 1,0.0"' in sparkline([1, 2, nan, 2])
    assert "<polyline" not in sparkline([])
