"""Water-filling: the best planes first, for every budget, against every way to spend a small one."""

import itertools

import numpy as np
import pytest
import torch

from kvstore_codecs.allocation import PLANES_MAX, band_of, plane_order, words_by_head
from kvstore_codecs.planes import plane_code
from tests.codecs.inputs import seeded

ERROR = [1.0, *(plane_code(planes, planes).mse for planes in range(1, PLANES_MAX + 1))]


def error_of(weights: torch.Tensor, depths: tuple[int, ...]) -> float:
    """Expected error of a head whose bands have these depths."""
    bands = weights.double().view(len(depths), -1).sum(1).tolist()
    return sum(weight * ERROR[depth] for weight, depth in zip(bands, depths, strict=True))


def spent(heads: list[torch.Tensor], words: list[int]) -> float:
    """The error of heads that store their best planes in so many words."""
    total = 0.0
    for weights, count in zip(heads, words, strict=True):
        order, band = plane_order(weights), band_of(len(weights))
        depths = np.bincount(order.bands[: count * 32 // band], minlength=len(weights) // band)
        total += error_of(weights, tuple(depths.tolist()))
    return total


def falling(heads: int, d: int, seed: int) -> list[torch.Tensor]:
    weights = torch.rand(heads, d, generator=seeded(seed)).pow(4).sort(dim=1, descending=True).values
    return list(weights * torch.logspace(0, 2, heads)[:, None] + 1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0, 1, 2, 3, 5, 8, 12])
def test_no_other_way_to_spend_the_words_of_two_heads_is_better(seed: int, budget: int):
    """Every depth of every band that fits, with d = 32: four bands of eight, seven depths, words within a head."""
    heads = falling(2, 32, seed)
    best = np.full((2, budget + 1), np.inf)
    for index, weights in enumerate(heads):
        for depths in itertools.product(range(PLANES_MAX + 1), repeat=4):
            words = -(-sum(depths) // 4)
            if words <= budget:
                best[index, words] = min(best[index, words], error_of(weights, depths))
    best = np.minimum.accumulate(best, axis=1)
    optimum = min(best[0, first] + best[1, budget - first] for first in range(budget + 1))
    found = words_by_head(np.stack([plane_order(weights).words for weights in heads]), budget)
    assert found.sum() == budget
    assert spent(heads, found.tolist()) == pytest.approx(optimum, rel=1e-9)


def test_a_worse_allocation_is_found_worse():
    """The comparison above notices a budget that is spent evenly."""
    heads = falling(2, 32, 0)
    found = words_by_head(np.stack([plane_order(weights).words for weights in heads]), 6)
    assert found.tolist() != [3, 3]
    assert spent(heads, [3, 3]) > 1.01 * spent(heads, found.tolist())


@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
def test_planes_of_a_band_come_in_order_and_all_come_once(d: int):
    order, bands = plane_order(falling(1, d, d)[0]), d // band_of(d)
    assert sorted(zip(order.bands.tolist(), order.planes.tolist(), strict=True)) == [
        (band, plane) for band in range(bands) for plane in range(PLANES_MAX)
    ]
    for band in range(bands):
        assert order.planes[order.bands == band].tolist() == list(range(PLANES_MAX))
    assert (np.diff(order.words) <= 0).all()
    assert len(order.words) == PLANES_MAX * d // 32


def test_what_a_smaller_budget_takes_is_part_of_what_a_larger_one_takes():
    values = np.stack([plane_order(weights).words for weights in falling(7, 64, 3)])
    taken = [words_by_head(values, budget) for budget in range(values.size + 1)]
    assert all((more >= less).all() for less, more in itertools.pairwise(taken))
    assert [int(words.sum()) for words in taken] == list(range(values.size + 1))
    assert taken[3].min() == 0


def test_equal_planes_are_taken_from_the_first_head_and_band():
    values = np.stack([plane_order(torch.ones(64)).words] * 3)
    assert words_by_head(values, 4).tolist() == [2, 2, 0]
    assert plane_order(torch.ones(64)).bands[:8].tolist() == list(range(8))
