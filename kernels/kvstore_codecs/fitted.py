"""Plans of the codecs with a fitted basis: whose basis, and how bits or coordinates are shared out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_codecs.allocation import PLANES_MAX, plane_order, ranks_of, words_of
from kvstore_codecs.artifact import Projection
from kvstore_codecs.matryoshka import level_budgets, matryoshka_plan
from kvstore_codecs.plan import DEBIAS, Fit, ProjectedPlan, SignPlan
from kvstore_codecs.projected import projected_plan
from kvstore_codecs.spec import KINDS, CodecSpec, Fitted, Kind, Matryoshka, ModelShape, Projected
from kvstore_codecs.transform import Basis
from kvstore_kernels.types import WORD_ROWS

FittedPlans = dict[tuple[int, Kind], SignPlan | ProjectedPlan]


@dataclass(frozen=True)
class _Place:
    """One layer and kind of a codec: row `row` of `basis`, its means [H, D] and, `budget` [H, D], what shares bits out.

    Budgets are weights as they are where they are comparable, else shares of the head's energy.
    """

    layer: int
    kind: Kind
    basis: Basis
    row: int
    mean: Tensor
    budget: Tensor


def fitted_plans(spec: CodecSpec, shape: ModelShape, fit: Fit | None, projections: Sequence[Projection]) -> FittedPlans:
    """The plan of every layer and kind whose codec has a fitted basis.

    ValueError if a projection that the spec names is not given or was made for another model.
    """
    known = {projection.sha256: projection for projection in projections}
    plans: FittedPlans = {}
    members: dict[Fitted, list[tuple[int, Kind]]] = {}
    for kind in KINDS:
        for layer, codec in enumerate(spec.of_layers(kind, shape.layers)):
            if isinstance(codec, Fitted):
                members.setdefault(codec, []).append((layer, kind))
    for codec, layers in members.items():
        sha256 = codec.basis.partition(":")[2]
        if sha256 and sha256 not in known:
            raise ValueError(f"projection {sha256[:12]} is not here")
        projection = known[sha256] if sha256 else None
        if projection is not None:
            projection.check_serves(spec, shape)
        if codec.basis.startswith("session"):
            places = [_own_place(spec, shape, fit, projection, *member) for member in layers]
        else:
            assert projection is not None
            places = [_given_place(fit, projection, *member) for member in layers]
        made = (
            _matryoshka(codec, places, projection)
            if isinstance(codec, Matryoshka)
            else _projected(codec, places, projection)
        )
        plans |= {(place.layer, place.kind): plan for place, plan in zip(places, made, strict=True)}
    return plans


def _own_place(
    spec: CodecSpec, shape: ModelShape, fit: Fit | None, projection: Projection | None, layer: int, kind: Kind
) -> _Place:
    """In a basis of the fit; ValueError if it has none."""
    basis, rows = None if fit is None else fit.basis_of(kind), spec.session_layers(kind, shape.layers)
    expected = (len(rows), shape.kv_heads, shape.head_dim, shape.head_dim)
    if fit is None or basis is None or basis.matrix.shape != expected:
        raise ValueError(f"the fit has no basis of the {kind} of {len(rows)} layers")
    row = rows.index(layer)
    budget = _shares(basis.weights[row]) if projection is None else budget_weights(projection, layer, kind)
    return _Place(layer, kind, basis, row, fit.of(kind)[layer], budget)


def _given_place(fit: Fit | None, projection: Projection, layer: int, kind: Kind) -> _Place:
    mean = projection.mean(kind) if fit is None else fit.of(kind)
    return _Place(layer, kind, projection.basis(kind), layer, mean[layer], budget_weights(projection, layer, kind))


def budget_weights(projection: Projection, layer: int, kind: Kind) -> Tensor:
    """What shares bits out to the heads [H, D] of a layer and kind."""
    weights = projection.basis(kind).weights[layer]
    return weights if projection.weighted else _shares(weights)


def _shares(weights: Tensor) -> Tensor:
    """Of each head's sum, which is taken in one order."""
    wide = weights.double().numpy()
    return torch.from_numpy(wide / np.add.accumulate(wide, axis=1)[:, -1:])


def _matryoshka(codec: Matryoshka, places: list[_Place], projection: Projection | None) -> Iterator[SignPlan]:
    orders = [[plane_order(weights) for weights in place.basis.weights[place.row]] for place in places]
    budgets = level_budgets(codec.bits)
    words = _words_by_level(budgets, places, projection)
    debias = 0.0 if projection is not None and projection.weighted else DEBIAS
    for index, place in enumerate(places):
        levels = [tuple(level[index].tolist()) for level in words]
        yield matryoshka_plan(place.basis, place.row, orders[index], levels, place.mean, debias)


def _words_by_level(
    budgets: list[float], places: list[_Place], projection: Projection | None
) -> list[NDArray[np.int64]]:
    """Words that each level reads [places, H], each at most those of the level before."""
    weights = torch.stack([place.budget for place in places])
    levels = [np.full(weights.shape[:2], PLANES_MAX * weights.shape[2] // WORD_ROWS)]
    for bits in budgets:
        found = _searched(places, projection, f"words.{bits:g}", round(bits * weights.numel() / WORD_ROWS))
        levels.append(np.minimum(words_of(weights, bits) if found is None else found, levels[-1]))
    return levels[1:]


def _projected(codec: Projected, places: list[_Place], projection: Projection | None) -> Iterator[ProjectedPlan]:
    """Leading coordinates, as they were searched for or by their weights."""
    weights = torch.stack([place.budget for place in places])
    found = _searched(places, projection, f"ranks.{codec.share:g}", round(codec.share * weights.numel()))
    for place, own in zip(places, ranks_of(weights, codec.share) if found is None else found, strict=True):
        yield projected_plan(place.basis, place.row, own.tolist(), place.mean)


def _searched(places: list[_Place], projection: Projection | None, name: str, total: int) -> NDArray[np.int64] | None:
    """What a projection allots to these places [places, H]; None if it does not, or spends another total on them.

    A search shares a budget among all layers and both kinds, and says nothing of a codec for some of them.
    """
    allotted = None if projection is None else projection.parts.get(name)
    if allotted is None:
        return None
    found = np.stack([allotted[KINDS.index(place.kind), place.layer].numpy() for place in places])
    return found if found.sum() == total else None
