import pytest
import torch

from kvstore_kernels import cpu_backend
from tests.kernels.inputs import normal

topk = cpu_backend().topk


def test_best_scores_come_first_with_their_positions() -> None:
    scores = normal(2, 3, 500)
    positions, best = topk(scores, 20)
    assert positions.dtype == torch.int64
    assert torch.equal(best, scores.sort(descending=True).values[..., :20])
    assert torch.equal(scores.gather(2, positions), best)


def test_of_equal_scores_the_lower_position_wins() -> None:
    scores = torch.tensor([[[1.0, 5.0, -2.0, 5.0, 5.0, 1.0]]])
    assert topk(scores, 4)[0].tolist() == [[[1, 3, 4, 0]]]


def test_zeros_of_either_sign_are_equal() -> None:
    assert topk(torch.tensor([[[-0.0, 0.0, -0.0]]]), 2)[0].tolist() == [[[0, 1]]]


def test_many_ties_agree_with_a_stable_sort() -> None:
    scores = (normal(1, 2, 2000) * 3).round()
    order = scores.sort(dim=2, descending=True, stable=True)
    positions, best = topk(scores, 700)
    assert torch.equal(positions, order.indices[..., :700])
    assert torch.equal(best, order.values[..., :700])


def test_infinities_sort_at_the_ends() -> None:
    scores = torch.tensor([[[-torch.inf, 3e38, torch.inf, -3e38]]])
    assert topk(scores, 4)[0].tolist() == [[[2, 1, 3, 0]]]


@pytest.mark.parametrize(("tokens", "k", "expected"), [(5, 9, 5), (5, 5, 5), (5, 0, 0), (0, 3, 0)])
def test_k_is_cut_to_the_tokens_there_are(tokens: int, k: int, expected: int) -> None:
    positions, best = topk(normal(1, 2, tokens), k)
    assert positions.shape == best.shape == (1, 2, expected)


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    scores = normal(4, 3, 300).round(decimals=1)
    assert torch.equal(topk(scores, 10)[0][2:3], topk(scores[2:3], 10)[0])
