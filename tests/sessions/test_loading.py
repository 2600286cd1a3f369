"""Rows on their way into memory while another brings the same, or when there is no more memory."""

import pytest
import torch
from torch import Tensor

from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS, RAW
from kvstore_server.memory.growing import pageable
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.sessions import loading
from kvstore_server.sessions.loading import extend_resident, rows_between
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.session_state import SessionState

from ..storage.inputs import SHAPE, commit_log, next_segment
from ..storage.memory_store import MemoryStore

APPENDS, EACH = 3, 200
TOKENS = APPENDS * EACH


@pytest.fixture
def log() -> CommitLog:
    return commit_log(MemoryStore())


@pytest.fixture
def state(log: CommitLog) -> SessionState:
    state = log.create("a", SHAPE, RAW)[0]
    for seed in range(APPENDS):
        log.commit(state, next_segment(log, state, EACH, exact=EACH, widths=None, seed=seed))
    return state


def rows_of(resident: ResidentSession) -> list[Tensor]:
    return [
        resident.exact_rows(layer, kind, 0, resident.length).clone() for layer in range(SHAPE.layers) for kind in KINDS
    ]


def assert_loads(log: CommitLog, state: SessionState, resident: ResidentSession) -> None:
    alone = ResidentSession(SHAPE)
    for each in (resident, alone):
        extend_resident(log, state, each, TOKENS)
        assert each.length == TOKENS
    assert all(torch.equal(*pair) for pair in zip(rows_of(resident), rows_of(alone), strict=True))


@pytest.mark.parametrize("end", [EACH, EACH + 1, TOKENS])
def test_who_loads_what_another_has_loaded_meanwhile_adds_nothing_twice(
    log: CommitLog, state: SessionState, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    """As a load does that went on in its thread when its caller had left."""
    resident, met = ResidentSession(SHAPE), list[int]()

    def meets(rows: KindRows, first: int, last: int) -> KindRows:
        if not met:
            met.append(first)
            extend_resident(log, state, resident, end)
        return rows_between(rows, first, last)

    monkeypatch.setattr(loading, "rows_between", meets)
    assert_loads(log, state, resident)
    assert met


@pytest.mark.parametrize("allocations", range(1, 2 * 2 * SHAPE.layers))
def test_rows_for_which_there_was_no_memory_are_as_if_they_had_never_come(
    log: CommitLog, state: SessionState, allocations: int
) -> None:
    left = [allocations]

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        return pageable(shape, dtype)

    resident = ResidentSession(SHAPE, allocate)
    with pytest.raises(MemoryError):
        extend_resident(log, state, resident, TOKENS)
    assert_loads(log, state, resident)
