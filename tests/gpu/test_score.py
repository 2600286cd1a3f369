"""The score kernel against the reference on the same sketches."""

import pytest
import torch
from torch import Tensor

from kvstore_kernels import reference
from kvstore_kernels.cuda.score import score
from kvstore_kernels.types import Expansion, SignRows
from tests.gpu import inputs
from tests.gpu.inputs import EXPANSIONS, every_expansion, on_pages, queries, worst
from tests.kernels.inputs import SIZES, expansion, logits64, sign_rows, strided

inputs.require_device()
pytestmark = pytest.mark.gpu
QJL = EXPANSIONS["qjl"]


def assert_scores(actual: Tensor, q: Tensor, keys: SignRows, sm_scale: float, cap: float = 0.0) -> None:
    """At most twice the error of the reference, or of rounding to the result's own type."""
    truth = logits64(q.cpu(), keys, sm_scale, cap)
    plain = reference.score(q.cpu(), keys, sm_scale=sm_scale, logit_soft_cap=cap).to(actual.dtype)
    assert worst(actual, truth) <= 2 * worst(plain, truth) + 4e-7 * float(truth.abs().amax() if truth.numel() else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_expansion
def test_every_layout(by: Expansion, dtype: torch.dtype) -> None:
    keys, q = sign_rows(600, by), queries(by)
    actual = score(q, on_pages(keys, values=False), sm_scale=0.125, dtype=dtype)
    assert actual.dtype == dtype
    assert_scores(actual, q, keys, 0.125)


@pytest.mark.parametrize("tokens", [*SIZES, 2047, 2048, 2049])
def test_every_token_count(tokens: int) -> None:
    keys, q = sign_rows(tokens, QJL), queries(QJL, 1)
    assert_scores(score(q, on_pages(keys, values=False), sm_scale=0.125), q, keys, 0.125)


@pytest.mark.parametrize(
    ("first", "end"), [(0, 1), (3, 700), (255, 257), (256, 512), (300, 300), (300, 301), (511, 700)]
)
def test_a_window_scores_as_in_the_whole(first: int, end: int) -> None:
    keys, q = sign_rows(700, QJL), queries(QJL)
    whole = score(q, on_pages(keys, values=False), sm_scale=0.125)
    placed = on_pages(inputs.window(keys, first, end), values=False, first=first, seed=3)
    assert torch.equal(score(q, placed, sm_scale=0.125), whole[:, :, first:end])


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_grouped_query_heads_score_as_each_alone(group: int) -> None:
    keys, q = on_pages(sign_rows(300, QJL), values=False), queries(QJL, 2, group)
    together = score(q, keys, sm_scale=0.125)
    for g in range(group):
        assert torch.equal(score(q[:, g::group], keys, sm_scale=0.125), together[:, g::group])


@pytest.mark.parametrize("name", ["qjl", "ragged groups", "level"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 32])
def test_a_query_token_scores_alone_as_among_others(tokens: int, name: str) -> None:
    by = EXPANSIONS[name]
    keys, q = on_pages(sign_rows(600, by), values=False), queries(by, tokens, 4)
    together = score(q, keys, sm_scale=0.125)
    for token in {0, tokens // 2, tokens - 1}:
        assert torch.equal(score(q[token : token + 1], keys, sm_scale=0.125)[0], together[token])


def test_neither_a_second_run_nor_other_pages_change_a_bit() -> None:
    keys, q = sign_rows(5000, QJL), queries(QJL)
    pages = on_pages(keys, values=False)
    first = score(q, pages, sm_scale=0.125)
    assert torch.equal(score(q, pages, sm_scale=0.125), first)
    assert torch.equal(score(q, on_pages(keys, values=False, seed=9), sm_scale=0.125), first)


@pytest.mark.parametrize("cap", [20.0, 50.0])
def test_the_soft_cap(cap: float) -> None:
    keys, q = sign_rows(300, QJL), 10 * queries(QJL, 1)
    actual = score(q, on_pages(keys, values=False), sm_scale=0.125, logit_soft_cap=cap)
    assert actual.abs().max() <= cap
    assert worst(actual, logits64(q.cpu(), keys, 0.125, cap)) <= 4e-7 * cap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_every_type(dtype: torch.dtype) -> None:
    keys, q = sign_rows(300, QJL), queries(QJL).to(dtype)
    assert_scores(score(q, on_pages(keys, values=False), sm_scale=0.125), q, keys, 0.125)


def test_strided_and_zero_queries() -> None:
    keys, q = on_pages(sign_rows(300, QJL), values=False), queries(QJL)
    assert torch.equal(score(strided(q), keys, sm_scale=0.125), score(q, keys, sm_scale=0.125))
    assert not score(torch.zeros_like(q), keys, sm_scale=0.125).any()
    assert score(q[:0], keys, sm_scale=0.125).shape == (0, 6, 300)


def test_words_beyond_the_level_are_not_read() -> None:
    by = expansion((6, 6), read=(2, 5))
    keys, q = sign_rows(300, by), queries(by)
    before = score(q, on_pages(keys, values=False), sm_scale=0.125)
    keys.signs.words.view(300, 2, 6)[:, 0, 2:] ^= -1
    assert torch.equal(score(q, on_pages(keys, values=False), sm_scale=0.125), before)
