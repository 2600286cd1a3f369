"""MatryoshkaKV as published: leading coordinates, read by the dense op."""

import pytest
import torch
from torch import Tensor

from kvstore_codecs import projected
from kvstore_codecs.artifact import Metric
from kvstore_codecs.plan import ProjectedPlan, SignPlan
from kvstore_codecs.projected import ProjectedRows, project
from kvstore_codecs.spec import Kind, Projected
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import DenseRows, NonFiniteError, ScaleRangeError, SignRows
from tests.codecs.inputs import seeded
from tests.codecs.spectra import HEADS, LAYERS, fitted_plan, matryoshka, projection, vectors


def plan_of(d: int, share: float, metric: Metric = "none", layer: int = 0, kind: Kind = "keys") -> ProjectedPlan:
    found = projection(d, metric)
    plan = fitted_plan(Projected(share=share, basis=f"projection:{found.sha256}"), d, found).of(layer, kind)
    assert isinstance(plan, ProjectedPlan)
    return plan


def stored(x: Tensor, plan: ProjectedPlan) -> ProjectedRows:
    return ProjectedRows(project(x, plan).scales, plan)


@pytest.mark.parametrize("metric", ["none", "output"])
def test_all_coordinates_are_the_vector(backend: Backend, metric: Metric):
    """r = d: scores, attention and vectors are those of dense attention, up to fp16."""
    d = 64
    k, v = vectors(d)[0, 0, :50], vectors(d)[1, 0, :50]
    keys, values = stored(k, plan_of(d, 1.0, metric)), stored(v, plan_of(d, 1.0, metric, kind="values"))
    q = torch.randn(4, 2 * HEADS, d, generator=seeded(1))
    assert (projected.decode(backend, keys) - k).abs().max() <= 2e-3 * k.abs().max()
    scores = projected.score(backend, q, keys, sm_scale=0.05)
    exact = backend.score(q, DenseRows(k), sm_scale=0.05)
    assert (scores - exact).abs().max() <= 2e-3 * exact.abs().max()
    out, lse = projected.attend(backend, q, keys, values, sm_scale=0.05)
    expected_out, expected_lse = backend.attend(q, DenseRows(k), DenseRows(v), sm_scale=0.05)
    assert (out - expected_out).abs().max() <= 5e-3 * v.abs().max()
    assert (lse - expected_lse).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_what_is_read_is_what_is_decoded(backend: Backend, share: float):
    """Scores and attention over coordinates are those over the rebuilt vectors, with a soft cap too."""
    d = 64
    k, v = vectors(d)[0, 1, :70], vectors(d)[1, 1, :70]
    keys, values = stored(k, plan_of(d, share, layer=1)), stored(v, plan_of(d, share, layer=1, kind="values"))
    rebuilt = DenseRows(projected.decode(backend, keys)), DenseRows(projected.decode(backend, values))
    q = torch.randn(3, 2 * HEADS, d, generator=seeded(2))
    for cap in (0.0, 5.0):
        found = projected.attend(backend, q, keys, values, sm_scale=0.05, logit_soft_cap=cap)
        expected = backend.attend(q, *rebuilt, sm_scale=0.05, logit_soft_cap=cap)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 1e-4 * other.abs().max()
        scores = projected.score(backend, q, keys, sm_scale=0.05, logit_soft_cap=cap)
        assert (scores - backend.score(q, rebuilt[0], sm_scale=0.05, logit_soft_cap=cap)).abs().max() <= 1e-4 * 30


def test_projected_and_sign_rows_mix(backend: Backend):
    d, q = 64, torch.randn(2, HEADS, 64, generator=seeded(3))
    k, v = vectors(d)[0, 0, :40], vectors(d)[1, 0, :40]
    signs = matryoshka(d, 4.0).of(0, "values")
    assert isinstance(signs, SignPlan)
    values = SignRows(backend.encode(v, signs.encoder), signs.levels[0])
    keys = stored(k, plan_of(d, 0.75))
    out, lse = projected.attend(backend, q, keys, values, sm_scale=0.05)
    expected = backend.attend(q, DenseRows(projected.decode(backend, keys)), values, sm_scale=0.05)
    assert (out - expected[0]).abs().max() <= 1e-3 * v.abs().max()
    assert (lse - expected[1]).abs().max() <= 1e-3


@pytest.mark.parametrize("rank", [8, 16, 32, 48])
def test_what_is_cut_off_is_the_tail_of_the_spectrum(backend: Backend, rank: int):
    """E|x - x^|^2 = sum of the weights not kept, which no other fixed basis beats on these vectors (Eckart-Young)."""
    d, x = 64, vectors(64)[0, 0]
    basis = projection(d, "none").basis("keys")
    plan = projected.projected_plan(basis, 0, [rank] * HEADS, projection(d, "none").mean("keys")[0])
    error = (projected.decode(backend, stored(x, plan)) - x).square().sum(2).mean(0)
    tail = basis.weights[0, :, rank:].sum(1)
    assert ((error / tail - 1).abs() <= 0.01).all()
    turned = torch.linalg.qr(torch.randn(HEADS, d, d, generator=seeded(rank))).Q
    centred = (x - plan.mean).transpose(0, 1)
    kept = turned[:, :, :rank]
    other = (centred - centred @ kept @ kept.transpose(1, 2)).square().sum(2).mean(1)
    assert (error < other).all()


def test_coordinates_keep_norms_and_errors_fall_with_the_rank(backend: Backend):
    d, x = 64, vectors(64)[0, 0, :300]
    z = project(x, plan_of(d, 1.0)).scales.float().view(len(x), HEADS, d)
    norms = (x - plan_of(d, 1.0).mean).norm(dim=2)
    assert (z.norm(dim=2) / norms - 1).abs().max() <= 1e-3
    errors = [
        (projected.decode(backend, stored(x, plan_of(d, share))) - x).square().sum().item()
        for share in (0.125, 0.25, 0.5, 0.75, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("share", [0.1, 0.375, 1.0])
def test_all_heads_together_keep_the_share(share: float):
    """By weight where weights are comparable: then ranks differ."""
    found = projection(64)
    plan = fitted_plan(Projected(share=share, basis=f"projection:{found.sha256}"), 64, found)
    ranks = [len(rows) for p in (*plan.keys, *plan.values) if isinstance(p, ProjectedPlan) for rows in p.forward]
    assert sum(ranks) == round(share * 2 * LAYERS * HEADS * 64)
    assert (len(set(ranks)) > 1) == (share < 1)
    assert plan.bytes_per_token == 2 * sum(ranks)


def test_bad_vectors_are_refused_by_token_and_head():
    plan = plan_of(64, 0.5)
    x = vectors(64)[0, 0, :5].clone()
    x[3, 2, 1] = torch.nan
    with pytest.raises(NonFiniteError) as error:
        project(x, plan)
    assert (error.value.token, error.value.head) == (3, 2)
    x[3, 2] = 1e7 * plan.forward[2][0]
    with pytest.raises(ScaleRangeError) as beyond:
        project(x, plan)
    assert (beyond.value.token, beyond.value.head) == (3, 2)
    assert project(x[:0], plan).scales.shape == (0, plan.widths.scales)
