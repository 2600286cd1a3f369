"""Constants of sign planes."""

import math

import pytest
import torch
from torch import Tensor

from kvstore_codecs.planes import level_weights, mean_magnitude, plane_code
from kvstore_codecs.spec import Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import STEP, SignRows, Signs
from tests.codecs.inputs import seeded, sign_plan

MSE_OF_ALL_PLANES = {1: 0.3634, 2: 0.1175, 3: 0.0374, 4: 0.01154, 5: 0.00349, 6: 0.00104}


@pytest.mark.parametrize("planes", STEP)
def test_all_planes_have_the_published_error(planes: int):
    """Lloyd-Max up to two planes, uniform mid-rise quantisers (Max 1960) from three."""
    code = plane_code(planes, planes)
    assert code.mse == pytest.approx(MSE_OF_ALL_PLANES[planes], rel=5e-3)
    assert code.noise == pytest.approx(code.mse * (1 - code.mse), rel=1e-2)


def test_prefixes_of_three_planes_have_their_refitted_errors():
    assert [plane_code(3, read).mse for read in (1, 2, 3)] == pytest.approx([0.3634, 0.1246, 0.0374], rel=2e-3)


@pytest.mark.parametrize("stored", STEP)
def test_one_more_plane_always_lowers_the_error(stored: int):
    errors = [plane_code(stored, read).mse for read in range(1, stored + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(1 - 2 / math.pi)


@pytest.mark.parametrize(("stored", "read"), [(3, 1), (3, 2), (4, 2), (6, 3)])
def test_refitted_weights_are_the_best_ones(stored: int, read: int):
    """Moving any weight away from the fit raises the error on simulated normal coordinates."""
    z = torch.randn(200_000, generator=seeded(1), dtype=torch.float64)
    half = 2 ** (stored - 1)
    index = ((z / STEP[stored]).ceil() - 1 + half).clamp(0, 2 * half - 1).long()
    t = torch.stack([2.0 * (index >> (stored - 1 - p) & 1).double() - 1 for p in range(read)])
    weights = torch.tensor(plane_code(stored, read).weights, dtype=torch.float64)
    best = (z - weights @ t).square().mean()
    assert best == pytest.approx(plane_code(stored, read).mse, rel=0.02)
    for change in (-0.02, 0.02):
        for plane in range(read):
            moved = weights.clone()
            moved[plane] += change
            assert (z - moved @ t).square().mean() > best


def test_a_level_of_all_planes_keeps_the_encoders_weights():
    for planes in STEP:
        assert level_weights(planes, planes, 128) == pytest.approx(plane_code(planes, planes).weights, abs=1e-6)


@pytest.mark.parametrize(
    ("stored", "read", "d", "golden"),
    [
        (3, 2, 128, (1.20164, 0.627565)),
        (4, 1, 64, (1.236721,)),
        (6, 3, 256, (1.670289, 0.838338, 0.417711)),
    ],
)
def test_level_weights_are_golden(stored: int, read: int, d: int, golden: tuple[float, ...]):
    """Answers at a level must not change with the machine or the release."""
    assert level_weights(stored, read, d) == golden


def test_mean_magnitude_is_the_gamma_quotient():
    for d in (1, 2, 3, 8, 64, 127, 256):
        exact = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
        assert mean_magnitude(d) == pytest.approx(exact, rel=1e-12)


def coding_error(backend: Backend, codec: Rotated, d: int) -> Tensor:
    """Mean square error per coordinate of random vectors of length sqrt(d), read with scale 1 instead of their own."""
    x = torch.randn(20_000, 1, d, generator=seeded(2))
    plan = sign_plan(codec, d)
    words = backend.encode(x, plan.encoder).words
    unit = Signs(words, torch.ones(len(words), 1, dtype=torch.float16))
    decoded = backend.decode(SignRows(unit, plan.levels[0]))
    return (x * math.sqrt(d) / x.norm(dim=-1, keepdim=True) - decoded).square().mean(dim=-1).flatten()


@pytest.mark.parametrize(
    ("planes", "d", "expected"),
    [(1, 128, 0.3611), (2, 128, 0.1159), (3, 256, 0.0374), (4, 256, 0.01154), (5, 256, 0.00349), (6, 256, 0.00104)],
)
def test_coding_directions_costs_what_the_quantiser_costs(backend: Backend, planes: int, d: int, expected: float):
    """The sphere's own figures for Lloyd-Max in 128 dimensions; those of a normal coordinate for uniform steps."""
    assert coding_error(backend, Rotated(planes=planes), d).mean().item() == pytest.approx(expected, rel=0.02)


def test_hadamard_and_haar_code_isotropic_vectors_alike(backend: Backend):
    """Mean and 99th percentile of the error agree within a tenth."""
    hadamard, haar = (coding_error(backend, Rotated(planes=3, basis=basis), 128) for basis in ("hadamard", "haar"))
    assert hadamard.mean().item() == pytest.approx(haar.mean().item(), rel=0.1)
    assert hadamard.quantile(0.99).item() == pytest.approx(haar.quantile(0.99).item(), rel=0.1)
