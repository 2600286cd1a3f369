"""The search for what each head keeps: against every allotment of a small case, and on a tiny model."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore_client.projections.allotment import allotted, most_of
from kvstore_client.projections.export import searched_projection
from kvstore_client.projections.search import Divergence, Found, SearchSettings, search
from kvstore_client.projections.surrogates import Codec
from kvstore_codecs.artifact import Projection, read_projection
from kvstore_codecs.plan import ProjectedPlan, SignPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import CodecSpec, Matryoshka, Projected

from .test_training import SAMPLES, model, start


def ended(projection: Projection, settings: SearchSettings, cost: Any) -> dict[float, Found]:
    return {found.budget: found for found in search(projection, settings, cost) if found.ended}


def convex(amounts: Tensor) -> float:
    """A cost whose best allotment is another than the weights': each head halves its own with every 8 coordinates."""
    sizes = torch.logspace(0, 1, amounts.numel())
    return float((sizes * 0.5 ** (amounts.flatten() / 8)).sum())


def test_exchanges_end_at_the_best_allotment_of_a_convex_cost() -> None:
    found = ended(start(), SearchSettings("projected", (0.25,), step=8, sweeps_max=50), convex)[0.25]
    floor = allotted("projected", start(), 0.25) % 8
    total = int(found.amounts.sum() - floor.sum()) // 8
    best = min(
        convex(8 * torch.tensor(steps) + floor.flatten())
        for steps in itertools.product(range(5), repeat=8)
        if sum(steps) == total and (8 * torch.tensor(steps) + floor.flatten() <= 32).all()
    )
    assert found.kl == pytest.approx(best, rel=1e-6)
    assert found.kl < found.kl_start


def test_descending_from_full_finds_it_too_and_spends_the_budget() -> None:
    settings = SearchSettings("projected", (0.25, 0.75), start="full", step=8)
    found = ended(start(), settings, convex)
    for budget in settings.budgets:
        assert int(found[budget].amounts.sum()) == int(allotted("projected", start(), budget).sum())
    exchanged = ended(start(), SearchSettings("projected", (0.25,), step=8, sweeps_max=50), convex)[0.25]
    assert found[0.25].kl <= 1.05 * exchanged.kl
    assert (found[0.25].amounts <= found[0.75].amounts).all()


@pytest.mark.parametrize("begin", ["full", "water-filling"])
def test_every_head_keeps_the_floor(begin: Any) -> None:
    settings = SearchSettings("projected", (0.25,), start=begin, step=4, floor=6)
    found = ended(start(), settings, convex)[0.25]
    assert int(found.amounts.min()) >= 6
    assert int(found.amounts.sum()) == 64
    with pytest.raises(ValueError, match="floor 9 of 8 heads is more than the budget's 64"):
        ended(start(), SearchSettings("projected", (0.25,), floor=9), convex)


@pytest.mark.parametrize(("codec", "budget", "step"), [("matryoshka", 1.0, 1), ("projected", 0.5, 4)])
def test_a_search_lowers_the_kl_at_an_equal_budget(codec: Codec, budget: float, step: int) -> None:
    cost = Divergence(model(), start(), codec, SAMPLES[:1])
    found = ended(start(), SearchSettings(codec, (budget,), step=step, sweeps_max=2), cost)[budget]
    assert found.kl <= found.kl_start == pytest.approx(cost(allotted(codec, start(), budget)))
    assert found.amounts.sum() == allotted(codec, start(), budget).sum()
    assert int(found.amounts.max()) <= most_of(codec, 32)


@pytest.mark.parametrize("begin", ["full", "water-filling"])
def test_a_resumed_search_ends_as_an_uninterrupted_one(begin: Any) -> None:
    settings = SearchSettings("projected", (0.25, 0.5), start=begin, step=8, sweeps_max=5)
    states = list(search(start(), settings, convex))
    for stop in range(1, len(states)):
        known = list({found.budget: found for found in states[:stop]}.values())
        rest = list(search(start(), settings, convex, known))
        assert [found.kl for found in rest] == [found.kl for found in states[stop:]]
        assert torch.equal(rest[-1].amounts, states[-1].amounts)


def test_sessions_store_what_was_searched_for_and_only_under_that_budget() -> None:
    words = allotted("matryoshka", start(), 2.0)
    words[0, 0, 0] -= 1
    words[1, 1, 1] += 1
    ranks = allotted("projected", start(), 0.5).flip(2)
    with_words = read_projection(searched_projection(start(), "matryoshka", {2.0: words}, "search", {"kl": 0.5}))
    found = read_projection(searched_projection(with_words, "projected", {0.5: ranks}, "search", {}))
    assert (found.header.budgets, found.header.shares, found.header.measured) == ((2.0,), (0.5,), {"kl": 0.5})
    basis = f"projection:{found.sha256}"
    assert stored(found, Matryoshka(bits=2, basis=basis)) == words.tolist()
    assert stored(found, Matryoshka(bits=1.5, basis=basis)) == allotted("matryoshka", found, 1.5).tolist()
    assert stored(found, Projected(share=0.5, basis=basis)) == ranks.tolist()
    keys_only = plan_for(
        CodecSpec(keys=Matryoshka(bits=2.0, basis=basis), values=Matryoshka(bits=1.0, basis=basis), mean="none"),
        shape(),
        None,
        (found,),
    )
    spent = sum(
        len(groups) for plan in keys_only.keys if isinstance(plan, SignPlan) for groups in plan.layout.word_groups
    )
    assert spent == 2 * 2 * 32 * 2 // 32


def shape() -> Any:
    from kvstore_client.integrations.model_shape import shape_of

    return shape_of(model())


def stored(projection: Projection, codec: Any) -> list[Any]:
    plan = plan_for(CodecSpec(keys=codec, values=codec, mean="none"), shape(), None, (projection,))

    def kept(each: Any) -> list[int]:
        if isinstance(each, ProjectedPlan):
            return [len(rows) for rows in each.forward]
        return [len(groups) for groups in each.layout.word_groups]

    return [[kept(each) for each in plans] for plans in (plan.keys, plan.values)]
