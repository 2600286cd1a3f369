"""Fitted bases: inverses, Hadamard bands, and codecs that follow from their bytes alone."""

import hashlib

import numpy as np
import pytest
import torch

from kvstore_codecs.artifact import ProjectionHeader, read_projection, write_projection
from kvstore_codecs.basis import haar
from kvstore_codecs.plan import ProjectedPlan
from kvstore_codecs.resolve import KEPT
from kvstore_codecs.spec import Matryoshka, Projected
from kvstore_codecs.transform import Basis, banded, inverse_of
from tests.codecs.inputs import seeded
from tests.codecs.spectra import HEADS, LAYERS, as_signs, fitted_plan, projection


@pytest.mark.parametrize("d", [32, 64, 96, 128])
def test_a_basis_and_its_inverse_are_the_identity(d: int):
    matrix = torch.randn(3, d, d, generator=seeded(d))
    product = inverse_of(matrix) @ matrix.double().numpy()
    assert np.abs(product - np.eye(d)).max() <= 1e-9
    orthogonal = torch.stack([haar(d, str(head)) for head in range(3)])
    assert np.abs(inverse_of(orthogonal) - orthogonal.transpose(1, 2).numpy()).max() <= 1e-6


def test_pivots_are_taken_where_the_diagonal_is_zero():
    turned = torch.eye(32).roll(1, dims=0).unsqueeze(0)
    assert np.array_equal(inverse_of(turned)[0], turned[0].T.numpy())


@pytest.mark.parametrize("d", [64, 128])
def test_a_fitted_basis_is_orthogonal_without_a_metric(d: int):
    matrix = projection(d, "none").basis("keys").matrix.double()
    assert (matrix.transpose(-1, -2) @ matrix - torch.eye(d)).abs().max() <= 1e-6


@pytest.mark.parametrize("band", [8, 16])
def test_bands_are_mixed_by_orthonormal_matrices(band: int):
    mixed = banded(np.eye(64)[None], band)[0]
    assert np.abs(mixed @ mixed.T - np.eye(64)).max() <= 1e-15
    assert set(np.abs(mixed[:band, :band]).round(12).flat) == {round(band**-0.5, 12)}
    assert not mixed[:band, band:].any()


def test_bad_bases_are_refused():
    good = Basis(torch.eye(32).expand(1, 2, 32, 32).clone(), torch.ones(1, 2, 32))
    good.check()
    with pytest.raises(ValueError, match="singular"):
        Basis(torch.ones(1, 2, 32, 32), good.weights).check()
    with pytest.raises(ValueError, match="NaN or Inf"):
        Basis(good.matrix * torch.nan, good.weights).check()
    with pytest.raises(ValueError, match="not positive"):
        Basis(good.matrix, 0 * good.weights).check()
    with pytest.raises(ValueError, match=r"weights are \[1, 2, 31\]"):
        Basis(good.matrix, good.weights[..., 1:]).check()


def from_seeds(d: int):
    """A projection whose bytes are the same on every machine."""
    parts = {}
    for kind in ("keys", "values"):
        bases = [haar(d, f"{kind}/{i}") * (1 + torch.arange(d) % 3) for i in range(LAYERS * HEADS)]
        parts[f"{kind}.basis"] = torch.stack(bases).view(LAYERS, HEADS, d, d)
        parts[f"{kind}.weights"] = (1.0 / (1 + torch.arange(LAYERS * HEADS * d) % 40)).view(LAYERS, HEADS, d)
        parts[f"{kind}.mean"] = torch.zeros(LAYERS, HEADS, d)
    header = ProjectionHeader(
        model_fingerprint="",
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=d,
        metric="output",
        max_position=1,
        calibration_tokens=1,
        calibration_length=1,
    )
    return read_projection(write_projection(header, parts))


@pytest.mark.parametrize(
    ("bits", "share", "plan_digest", "matrix_digest"),
    [(2.0, None, "ec2dbdbd66a86f12", "08cd561adc920e36"), (None, 0.5, "2ab4d2c745e9023e", "9b2aaf5a85812e1f")],
)
def test_codecs_follow_from_the_bytes_of_a_basis(
    bits: float | None, share: float | None, plan_digest: str, matrix_digest: str
):
    """A change here means that stored sessions are read with other numbers than they were written with."""
    found = from_seeds(64)
    basis = f"projection:{found.sha256}"
    codec = Matryoshka(bits=bits, basis=basis) if bits else Projected(share=share or 1.0, basis=basis)
    digests = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        KEPT.clear()
        plan = fitted_plan(codec, 64, found)
        keys = plan.of(1, "keys")
        matrices = torch.cat(keys.inverse if isinstance(keys, ProjectedPlan) else as_signs(keys).levels[0].matrix)
        digests.append((plan.fingerprint[:16], hashlib.sha256(matrices.numpy().tobytes()).hexdigest()[:16]))
    torch.set_num_threads(1)
    assert digests == [(plan_digest, matrix_digest)] * 2
