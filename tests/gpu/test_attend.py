"""The attention kernels against the reference on the same sketches."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore_kernels import build, merge_states
from kvstore_kernels.cuda.attend import attend
from kvstore_kernels.types import Expansion, SignRows
from tests.gpu import inputs
from tests.gpu.inputs import EXPANSIONS, every_expansion, on_pages, queries, rounded_attention64, window, worst
from tests.kernels.inputs import SIZES, attention64, expansion, logits64, normal, sign_rows, strided, vectors

inputs.require_device()
pytestmark = pytest.mark.gpu
QJL = EXPANSIONS["qjl"]
State = tuple[Tensor, Tensor]


def sketches(tokens: int, by: Expansion = QJL, values_by: Expansion | None = None) -> tuple[SignRows, SignRows]:
    return sign_rows(tokens, by), sign_rows(tokens, values_by or by, seed=7)


def attend_rows(q: Tensor, keys: SignRows, values: SignRows, first: int = 0, seed: int = 0, **how: Any) -> State:
    return attend(
        q,
        on_pages(keys, values=False, first=first, seed=seed),
        on_pages(values, values=True, first=first, seed=seed),
        **how,
    )


def assert_attends(actual: State, q: Tensor, keys: SignRows, values: SignRows, first: int = 0, **how: float) -> None:
    """At most twice the error of exact sums with weights rounded as the kernel says."""
    logits = logits64(q.cpu(), keys, how["sm_scale"], how.get("logit_soft_cap", 0.0), how.get("debias", 0.0))
    out, lse = attention64(logits, values)
    rows = max(len(matrix) for matrix in values.expansion.matrix)
    bits = 10 if rows > 3 * values.expansion.layout.head_dim else 8
    rounding = worst(rounded_attention64(logits, values, bits, first), out)
    assert worst(actual[0], out) <= 2 * rounding + 4e-6 * float(vectors(values).abs().max())
    assert worst(actual[1], lse) <= 2e-6 * (1 + float(logits.abs().max()))


@every_expansion
def test_every_layout_of_keys_and_of_values(by: Expansion) -> None:
    (keys, values), q = sketches(600, by), queries(by)
    how: dict[str, Any] = {"sm_scale": 0.125, "debias": 0.5}
    assert_attends(attend_rows(q, keys, values, **how), q, keys, values, **how)


@pytest.mark.parametrize(("by", "values_by"), [("12 bits", "offsets"), ("offsets", "12 bits")])
def test_keys_and_values_of_different_layouts(by: str, values_by: str) -> None:
    (keys, values), q = sketches(600, EXPANSIONS[by], EXPANSIONS[values_by]), queries(EXPANSIONS[by])
    assert_attends(attend_rows(q, keys, values, sm_scale=0.125), q, keys, values, sm_scale=0.125)


def test_deep_sketches_of_values_get_finer_weights() -> None:
    by = expansion((16, 16), 64, query_bits=8)
    (keys, values), q = sketches(600, by), queries(by)
    assert_attends(attend_rows(q, keys, values, sm_scale=0.125), q, keys, values, sm_scale=0.125)


@pytest.mark.parametrize("tokens", [*SIZES[1:], 2047, 2048, 2049, 9000])
def test_every_token_count(tokens: int) -> None:
    (keys, values), q = sketches(tokens), queries(QJL, 1)
    assert_attends(attend_rows(q, keys, values, sm_scale=0.125), q, keys, values, sm_scale=0.125)


@pytest.mark.parametrize(("first", "end"), [(0, 1), (3, 700), (255, 257), (256, 512), (300, 301), (511, 700)])
def test_a_window_of_positions(first: int, end: int) -> None:
    keys, values = (window(rows, first, end) for rows in sketches(700))
    q = queries(QJL)
    assert_attends(attend_rows(q, keys, values, first, sm_scale=0.125), q, keys, values, first, sm_scale=0.125)


@pytest.mark.parametrize("cap", [0.0, 20.0])
@pytest.mark.parametrize("debias", [0.0, 1.0])
def test_soft_cap_and_debias(cap: float, debias: float) -> None:
    (keys, values), q = sketches(300), 5 * queries(QJL)
    how: dict[str, Any] = {"sm_scale": 0.125, "logit_soft_cap": cap, "debias": debias}
    assert_attends(attend_rows(q, keys, values, **how), q, keys, values, **how)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_grouped_query_heads_attend_as_each_alone(group: int) -> None:
    keys, values = (on_pages(rows, values=kind) for rows, kind in zip(sketches(600), (False, True), strict=True))
    q = queries(QJL, 2, group)
    out, lse = attend(q, keys, values, sm_scale=0.125)
    for g in range(group):
        alone = attend(q[:, g::group], keys, values, sm_scale=0.125)
        assert torch.equal(out[:, g::group], alone[0])
        assert torch.equal(lse[:, g::group], alone[1])


@pytest.mark.parametrize("workers", [3, 8, 11, 32])
@every_expansion
def test_a_worker_s_rows_attend_alone_as_among_others(by: Expansion, workers: int) -> None:
    keys, values = (
        on_pages(window(rows, 300, 3000), values=kind, first=300)
        for rows, kind in zip(sketches(3000, by), (False, True), strict=True)
    )
    q = queries(by, workers, 4)
    hows: tuple[dict[str, Any], ...] = {"debias": 0.5}, {"logit_soft_cap": 20.0}
    for how in hows:
        out, lse = attend(q, keys, values, sm_scale=0.125, **how)
        for worker in {0, workers // 2, workers - 1}:
            alone = attend(q[worker : worker + 1], keys, values, sm_scale=0.125, **how)
            assert torch.equal(alone[0][0], out[worker])
            assert torch.equal(alone[1][0], lse[worker])


@pytest.mark.parametrize("workers", [3, 8])
@every_expansion
def test_products_of_warpgroups_change_no_bit(by: Expansion, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device before Hopper."""
    (keys, values), q = sketches(3000, by), queries(by, workers, 4)
    hows: tuple[dict[str, Any], ...] = {"debias": 0.5}, {"logit_soft_cap": 20.0}
    with_them = [attend_rows(q, keys, values, sm_scale=0.125, **how) for how in hows]
    monkeypatch.setattr(build, "has_warpgroups", lambda _: False)
    for how, (out, lse) in zip(hows, with_them, strict=True):
        without = attend_rows(q, keys, values, sm_scale=0.125, **how)
        assert torch.equal(without[0], out)
        assert torch.equal(without[1], lse)


@pytest.mark.parametrize("tokens", [1, 255, 257, 2047, 2049, 9000])
def test_many_rows_of_every_token_count(tokens: int) -> None:
    (keys, values), q = sketches(tokens), queries(QJL, 8, 4)
    assert_attends(attend_rows(q, keys, values, sm_scale=0.125), q, keys, values, sm_scale=0.125)


def test_neither_a_second_run_nor_other_pages_change_a_bit() -> None:
    (keys, values), q = sketches(9000), queries(QJL)
    first = attend_rows(q, keys, values, sm_scale=0.125)
    for seed in (0, 9):
        again = attend_rows(q, keys, values, seed=seed, sm_scale=0.125)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("workers", [1, 8])
def test_splits_that_are_no_whole_rounds(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 pages."""
    (keys, values), q = sketches(9000), queries(QJL, workers, 4)
    monkeypatch.setattr(build, "multiprocessors", lambda _: 3)
    out, lse = attend_rows(q, keys, values, sm_scale=0.125)
    assert_attends((out, lse), q, keys, values, sm_scale=0.125)
    alone = attend_rows(q[-1:], keys, values, sm_scale=0.125)
    assert torch.equal(alone[0][0], out[-1])
    assert torch.equal(alone[1][0], lse[-1])


def test_half_results_are_the_float_results_rounded() -> None:
    keys, values = (on_pages(rows, values=kind) for rows, kind in zip(sketches(600), (False, True), strict=True))
    q = queries(QJL)
    out, lse = attend(q, keys, values, sm_scale=0.125)
    half, half_lse = attend(q, keys, values, sm_scale=0.125, dtype=torch.float16)
    assert torch.equal(half, out.half())
    assert torch.equal(half_lse, lse)


def test_one_token_far_above_all_others_is_the_answer() -> None:
    (keys, values), q = sketches(2000), queries(QJL)
    keys.signs.scales[1234] = 50
    assert_attends(attend_rows(30 * q, keys, values, sm_scale=0.5), 30 * q, keys, values, sm_scale=0.5)


def test_no_tokens_give_zero_and_minus_infinity() -> None:
    q = queries(QJL)
    for first in (0, 256, 300):
        out, lse = attend_rows(q, *sketches(0), first, sm_scale=0.125)
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(lse, torch.full(q.shape[:2], -torch.inf, device=q.device))
    assert attend_rows(q[:0], *sketches(5), sm_scale=0.125)[0].shape == (0, 6, 128)


@pytest.mark.parametrize("tokens", [0, 300])
def test_a_result_over_other_tokens_is_merged_in(tokens: int) -> None:
    rows, q = sketches(tokens), queries(QJL)
    beside = normal(*q.shape, seed=8).to(q.device), normal(*q.shape[:2], seed=9).to(q.device)
    out, lse = attend_rows(q, *rows, sm_scale=0.125, beside=lambda: beside)
    expected = merge_states([beside, attend_rows(q, *rows, sm_scale=0.125)])
    assert worst(out, expected[0]) <= 2e-6 * float(expected[0].abs().max())
    assert worst(lse, expected[1]) <= 1e-6 * (1 + float(expected[1].abs().max()))


def test_strided_queries() -> None:
    (keys, values), q = sketches(300), queries(QJL)
    expected = attend_rows(q, keys, values, sm_scale=0.125)
    assert torch.equal(attend_rows(strided(q), keys, values, sm_scale=0.125)[0], expected[0])


def test_sketches_of_different_positions_are_refused() -> None:
    keys, values = sketches(5)
    with pytest.raises(ValueError, match="keys of rows"):
        attend(queries(QJL), on_pages(keys, values=False), on_pages(values, values=True, first=1), sm_scale=1.0)
