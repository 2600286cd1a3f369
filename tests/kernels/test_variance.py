from dataclasses import replace

import pytest
import torch

from kvstore_kernels.types import Expansion
from kvstore_kernels.variance import ScoreNoise, alpha_columns, mean_noise, score_variance, sum_of_squares
from tests.kernels.inputs import assert_close, expansion, logits64, normal, sign_rows

EXPANSIONS = [
    expansion(),
    expansion((4, 0, 7), groups=2, offsets=True),
    expansion((8, 8), head_dim=128, groups=2, read=(3, 5)),
]


@pytest.mark.parametrize("by", EXPANSIONS, ids=range(len(EXPANSIONS)))
def test_score_variance_is_the_mean_over_stored_tokens(by: Expansion) -> None:
    keys, q = sign_rows(50, by), normal(3, 3 * by.layout.heads, by.layout.head_dim)
    actual = score_variance(q, by, sum_of_squares(keys.signs.scales, alpha_columns(by.layout)) / 50)
    assert actual.dtype == torch.float32
    assert actual.shape == q.shape[:2]
    expected = (logits64(q, keys, 1.0) - logits64(q, keys, 1.0, debias=2.0)).mean(2)
    assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


def test_sums_of_squares_of_no_tokens_are_zero() -> None:
    layout = expansion().layout
    assert not sum_of_squares(torch.zeros(0, layout.scales, dtype=torch.float16), alpha_columns(layout)).any()


def test_orthogonal_blocks_of_equal_noise_need_no_form() -> None:
    by = expansion((8, 8))
    basis = torch.linalg.qr(normal(64, 64))[0]
    whole = replace(by, matrix=(torch.cat([basis, 2 * basis, basis, basis]),) * 2, noise=(torch.full((256,), 0.3),) * 2)
    assert by.noise_factor is None
    assert whole.noise_factor is not None
    squares, q = normal(2, 1).square().double(), normal(3, 4, 64)
    expected = torch.einsum(
        "thrd,hde,thre->thr", q.unflatten(1, (2, 2)), whole.noise_form[:, 0], q.unflatten(1, (2, 2))
    )
    assert_close(score_variance(q, whole, squares), (expected * squares.view(2, 1)).flatten(1).float(), rtol=1e-4)


def test_the_noise_of_several_parts_is_the_mean_over_their_tokens() -> None:
    """Whether or not some need no form."""
    q, forms = normal(3, 4, 8), normal(2, 2, 8, 8)
    factor = ScoreNoise(torch.tensor([0.3, 0.5]))
    for parts in ([ScoreNoise(forms[0]), ScoreNoise(forms[1])], [factor, ScoreNoise(forms[1])], [factor, factor]):
        expected = (30 * parts[0].variance(q) + 10 * parts[1].variance(q)) / 40
        assert_close(mean_noise([(30, parts[0]), (10, parts[1])]).variance(q), expected, rtol=1e-5)
    assert mean_noise([(7, factor)]) is factor
