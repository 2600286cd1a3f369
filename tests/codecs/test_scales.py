"""The inner-product preserving scale: exact along the key, equivariant, at every level."""

import pytest
import torch

from kvstore_codecs.spec import Qjl, Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import SignRows
from tests.codecs.inputs import SignCodec, seeded, sign_plan

CODECS = [
    (Qjl(bits=256), 128),
    (Qjl(bits=128, basis="hadamard"), 64),
    (Qjl(bits=256, outlier_channels=(1, 2, 64)), 128),
    (Rotated(planes=1), 96),
    (Rotated(planes=2), 128),
    (Rotated(planes=4, basis="haar"), 128),
]


def keys(d: int) -> torch.Tensor:
    """Keys of very different norms [400, 1, d]."""
    x = torch.randn(400, 1, d, generator=seeded(5))
    return x * torch.logspace(-2, 2, 400)[:, None, None]


@pytest.mark.parametrize(("codec", "d"), CODECS, ids=str)
def test_a_key_scores_its_own_norm_exactly_at_the_finest_level(backend: Backend, codec: SignCodec, d: int):
    x, plan = keys(d), sign_plan(codec, d)
    decoded = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0])).double()
    ratio = (x.double() * decoded).sum(dim=-1) / x.double().square().sum(dim=-1)
    assert (ratio - 1).abs().max() <= 1e-3


@pytest.mark.parametrize(("codec", "d"), CODECS, ids=str)
def test_a_key_scores_its_own_norm_on_average_at_every_level(backend: Backend, codec: SignCodec, d: int):
    """One scale is stored: coarser levels read it times a calibrated ratio."""
    x, plan = keys(d), sign_plan(codec, d)
    signs = backend.encode(x, plan.encoder)
    for level in plan.levels:
        decoded = backend.decode(SignRows(signs, level)).double()
        ratio = (x.double() * decoded).sum(dim=-1) / x.double().square().sum(dim=-1)
        assert abs(ratio.mean() - 1) <= 4 * ratio.std() / len(x) ** 0.5 + 1e-4


@pytest.mark.parametrize("factor", [1e-2, 3.0, 1e3])
@pytest.mark.parametrize(("codec", "d"), CODECS, ids=str)
def test_scaling_a_key_scales_its_scores_and_keeps_its_bits(backend: Backend, codec: SignCodec, d: int, factor: float):
    x, plan = torch.randn(50, 1, d, generator=seeded(6)), sign_plan(codec, d)
    first, second = backend.encode(x, plan.encoder), backend.encode(factor * x, plan.encoder)
    assert (first.words != second.words).double().mean() <= 1e-3
    for level in plan.levels:
        one, many = (backend.decode(SignRows(signs, level)) for signs in (first, second))
        assert (many - factor * one).abs().max() <= 1.1e-3 * factor * one.abs().max()


@pytest.mark.parametrize(("codec", "d"), CODECS, ids=str)
def test_scores_are_those_of_the_decoded_key_and_linear_in_the_query(backend: Backend, codec: SignCodec, d: int):
    """Up to the rounding of the integer query, half a step of its largest coordinate in every row."""
    plan = sign_plan(codec, d)
    signs = backend.encode(torch.randn(60, 1, d, generator=seeded(7)), plan.encoder)
    q = torch.randn(8, 1, d, generator=seeded(8))
    for level in plan.levels:
        rows = SignRows(signs, level)
        exact = torch.einsum("thd,nhd->thn", q.double(), backend.decode(rows).double())
        scores = backend.score(q, rows, sm_scale=1.0).double()
        step = (q[:, 0] @ level.matrix[0].T).abs().amax(dim=1) / (2 ** (level.query_bits - 1) - 1)
        alpha = signs.scales[:, : level.layout.groups].double().amax(dim=1)
        limit = step.double()[:, None] * alpha / 2 * level.matrix[0].shape[0] ** 0.5 * 3
        assert ((scores - exact).abs()[:, 0] <= limit + 1e-5).all()
    whole = backend.decode(SignRows(signs, plan.levels[0])).double()
    combined = torch.einsum("hd,nhd->hn", 2.5 * q[0].double() - q[1].double(), whole)
    parts = torch.einsum("thd,nhd->thn", q[:2].double(), whole)
    assert (combined - (2.5 * parts[0] - parts[1])).abs().max() <= 1e-5 * combined.abs().max()
