"""The topk kernel gives the reference's positions and scores, whatever the scores."""

import pytest
import torch
from torch import Tensor

from kvstore_kernels import reference
from kvstore_kernels.cuda import topk as ops
from kvstore_kernels.cuda.score import score
from tests.gpu import inputs
from tests.gpu.inputs import EXPANSIONS, on_pages, queries
from tests.kernels.inputs import normal, sign_rows, strided

inputs.require_device()
pytestmark = pytest.mark.gpu
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
SORTED = ops.CANDIDATES
GROUPED = ops.GROUPS * 256 * ops.LANES_MOST * ops.CHUNK
"""Tokens from which k = 256 is chosen among groups of the largest size."""


def assert_topk(scores: Tensor, k: int) -> None:
    positions, best = ops.topk(scores.to(inputs.DEVICE), k)
    expected = reference.topk(scores.cpu(), k)
    assert torch.equal(positions.cpu(), expected[0])
    assert torch.equal(best.cpu(), expected[1])


@either_dtype
@pytest.mark.parametrize(
    "tokens", [1, 7, 8, 9, 31, 257, SORTED - 1, SORTED, SORTED + 1, 20_000, GROUPED - 1, GROUPED, GROUPED + 1, 300_001]
)
def test_every_token_count(tokens: int, dtype: torch.dtype) -> None:
    scores = normal(1, 3, tokens).to(dtype)
    for k in (1, 10, 256):
        assert_topk(scores, k)


@pytest.mark.parametrize("k", [1, 2, 255, 256, 257, 4095, 4096])
@pytest.mark.parametrize("tokens", [4096, 8193, 65_535, 65_536, 1_000_003])
def test_every_k(tokens: int, k: int) -> None:
    assert_topk(normal(1, 2, tokens, seed=k), k)


@either_dtype
@pytest.mark.parametrize("tokens", [5000, 20_001, 200_003])
def test_scores_made_to_tie(tokens: int, dtype: torch.dtype) -> None:
    random = normal(1, 2, tokens)
    one_apart = torch.zeros(1, 2, tokens)
    one_apart[..., tokens // 3] = 1
    for scores in (
        torch.zeros(1, 2, tokens),
        torch.where(random > 0, 0.0, -0.0),
        one_apart,
        (random * 3).round(),
        1 + random * 1e-3,
        torch.where(random > 0, torch.inf, random),
        torch.where(random > -1, -torch.inf, random),
        random.sort().values,
        random.sort(descending=True).values,
    ):
        for k in (1, 300):
            assert_topk(scores.to(dtype), k)


@either_dtype
@pytest.mark.parametrize("shift", [0, 1, 3, 4, 7, 8])
def test_rows_that_begin_anywhere(shift: int, dtype: torch.dtype) -> None:
    scores = normal(2, 3, 40_013).to(dtype)
    assert_topk(scores[:, :, shift : shift + 40_000], 100)
    assert_topk(scores[:, 1:, shift : shift + 100], 100)


def test_strided_input() -> None:
    assert_topk(strided(normal(2, 3, 10_000)), 50)


def test_scores_of_a_window_are_taken_as_they_come() -> None:
    by = EXPANSIONS["qjl"]
    keys, q = sign_rows(2997, by), normal(2, 4, 128).to(inputs.DEVICE)
    for dtype in (torch.float32, torch.float16):
        scores = score(q, on_pages(keys, values=False, first=3), sm_scale=0.1, dtype=dtype)
        assert not scores.is_contiguous()
        assert_topk(scores, 64)


@pytest.mark.parametrize("name", ["qjl", "ragged groups"])
@pytest.mark.parametrize(
    ("first", "tokens"), [(0, 5000), (0, 8193), (3, 20_000), (63, 20_001), (191, 40_000), (255, 8200)]
)
def test_the_best_of_stored_keys_are_the_best_of_their_scores(first: int, tokens: int, name: str) -> None:
    by = EXPANSIONS[name]
    keys = on_pages(sign_rows(tokens, by), values=False, first=first)
    for q in (queries(by, 1, 4), queries(by, 5, 3), torch.zeros_like(queries(by, 1))):
        for k in (1, 6, 25, 60, 300):
            positions, best = ops.best(q, keys, k, sm_scale=0.1, logit_soft_cap=5.0)
            expected = ops.topk(score(q, keys, sm_scale=0.1, logit_soft_cap=5.0), k)
            assert torch.equal(positions, expected[0])
            assert torch.equal(best, expected[1])


def test_neither_a_second_run_nor_other_rows_change_the_answer() -> None:
    scores = normal(8, 4, 200_000).half().to(inputs.DEVICE)
    positions, best = ops.topk(scores, 256)
    again = ops.topk(scores, 256)
    assert torch.equal(again[0], positions)
    assert torch.equal(again[1], best)
    assert torch.equal(ops.topk(scores[3:4], 256)[0], positions[3:4])


@pytest.mark.parametrize(("tokens", "k", "expected"), [(5, 9, 5), (5, 5, 5), (5, 0, 0), (0, 3, 0)])
def test_k_is_cut_to_the_tokens_there_are(tokens: int, k: int, expected: int) -> None:
    positions, best = ops.topk(normal(1, 2, tokens).to(inputs.DEVICE), k)
    assert positions.shape == best.shape == (1, 2, expected)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    scores = normal(1, 2, 10).to(inputs.DEVICE)
    with pytest.raises(ValueError, match=r"k is 4097, not in \[0, 4096\]"):
        ops.topk(scores, 4097)
    with pytest.raises(ValueError, match=r"scores are torch\.float64"):
        ops.topk(scores.double(), 1)
