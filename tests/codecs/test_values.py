"""Values: min/max groups, and weighted sums that keep no bias."""

import pytest
import torch

from kvstore_codecs.spec import Affine, Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import SignRows
from tests.codecs.inputs import seeded, sign_plan, stored_variance


@pytest.mark.parametrize("planes", [1, 2, 4, 8])
@pytest.mark.parametrize("d", [32, 96, 128])
def test_every_element_is_within_half_a_step(backend: Backend, planes: int, d: int):
    """Half a step is alpha; scale and offset themselves are rounded to fp16."""
    x = torch.randn(200, 1, d, generator=seeded(1)) * 3 + 1
    plan = sign_plan(Affine(planes=planes), d)
    signs = backend.encode(x, plan.encoder)
    decoded = backend.decode(SignRows(signs, plan.levels[0]))
    alpha, beta = signs.scales.float().chunk(2, dim=1)
    limit = alpha + (beta.abs() + 2**planes * alpha) * 2**-11 + 1e-6
    assert ((decoded - x).abs()[:, 0] <= limit.repeat_interleave(32, dim=1)).all()


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-7, 60_000.0])
def test_a_constant_group_is_its_value(backend: Backend, value: float):
    plan = sign_plan(Affine(planes=2), 64)
    decoded = backend.decode(SignRows(backend.encode(torch.full((3, 1, 64), value), plan.encoder), plan.levels[0]))
    assert decoded.isfinite().all()
    assert (decoded - value).abs().max() <= abs(value) * 1e-3 + 1e-7


def test_each_group_has_its_own_range(backend: Backend):
    x = torch.randn(20, 1, 64, generator=seeded(2))
    x[..., 32:] *= 1000
    plan = sign_plan(Affine(planes=4), 64)
    decoded = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0]))
    assert (decoded - x)[..., :32].abs().max() <= 0.3


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_affine_promises_the_noise_it_has(backend: Backend, planes: int):
    """step^2 / 12 a channel for evenly spread values; levels promise a little more, as if codes were as frequent."""
    x = torch.rand(4000, 1, 64, generator=seeded(3))
    x[..., ::32], x[..., 1::32] = 0.0, 1.0
    plan = sign_plan(Affine(planes=planes), 64)
    signs = backend.encode(x, plan.encoder)
    q = torch.randn(64, 1, 64, generator=seeded(4))
    q[..., ::32] = q[..., 1::32] = 0
    for index, level in enumerate(plan.levels):
        errors = torch.einsum("thd,nhd->tn", q, backend.decode(SignRows(signs, level)) - x)
        ratio = errors.var() / stored_variance(q, level, signs.scales).mean()
        assert (0.7 if index else 0.95) <= ratio <= 1.05


def test_a_weighted_sum_of_values_has_no_bias(backend: Backend):
    """|E o^ - o| / |o| <= 1e-2 over bases; plain centroids of two planes would shrink the sum by 0.117."""
    tokens, d, bases = 64, 64, 400
    x = torch.randn(1, 1, d, generator=seeded(5)) + torch.randn(tokens, 1, d, generator=seeded(6))
    weights = torch.rand(tokens, generator=seeded(7))
    exact = torch.einsum("n,nhd->d", weights, x)
    total = torch.zeros(d)
    for layer in range(bases):
        plan = sign_plan(Rotated(planes=2), d, layer=layer, layers=bases)
        decoded = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0]))
        total += torch.einsum("n,nhd->d", weights, decoded) / bases
    assert (total - exact).norm() / exact.norm() <= 1e-2
