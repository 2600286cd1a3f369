import pytest
import torch

from kvstore_kernels.types import Expansion
from kvstore_kernels.variance import alpha_columns, score_variance, sum_of_squares
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
