"""Bases that a session fits to its own first tokens."""

import pytest
import torch
from pydantic import ValidationError

from kvstore_codecs.fit import Moments, fit_basis, fit_session
from kvstore_codecs.plan import Fit
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import CodecSpec, LayerOverride, Matryoshka, Projected, Raw, Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import SignRows
from tests.codecs.inputs import seeded, shape_of
from tests.codecs.spectra import HEADS, LAYERS, as_signs, metrics, projection, vectors

OWN = CodecSpec(keys=Matryoshka(), values=Matryoshka(), fit_tokens=512)


def fitted(spec: CodecSpec, d: int = 64, *projections) -> Fit:
    keys, values = vectors(d)[:, :, :600]
    return fit_session(spec, keys, values, 4, projections)


def test_moments_are_those_of_float64_however_pieces_come():
    x = torch.randn(700, 2, 32, generator=seeded(1)) + 5
    whole, pieces = Moments(2, 32), Moments(2, 32)
    whole.add(x)
    pieces.add(x[:100])
    pieces.add(x[100:])
    assert (whole.mean - x.double().mean(0)).abs().max() <= 1e-12
    for head in range(2):
        expected = torch.cov(x[:, head].double().T, correction=0)
        assert (whole.covariance[head] - expected).abs().max() <= 1e-10
        assert (pieces.covariance[head] - expected).abs().max() <= 1e-10


def test_weights_are_what_losing_a_coordinate_costs_in_the_metric():
    x, metric = vectors(64)[0, 0], metrics(64)[0, 0]
    moments = Moments(HEADS, 64)
    moments.add(x)
    basis = fit_basis(moments.covariance, metric)
    z = torch.einsum("nhd,hdc->nhc", (x - moments.mean.float()), basis.matrix[0])
    assert (z.square().mean(0) / basis.weights[0] - 1).abs().max() <= 0.02
    assert (basis.weights[0].diff(dim=1) <= 0).all()
    cost = torch.einsum("nhd,hde,nhe->nh", x - moments.mean.float(), metric, x - moments.mean.float()).mean(0)
    assert (z.square().sum(2).mean(0) / cost - 1).abs().max() <= 1e-3


def test_only_layers_with_a_session_basis_have_one():
    spec = CodecSpec(
        keys=Matryoshka(),
        values=Rotated(),
        overrides=(LayerOverride(layers=(0,), keys=Raw(), values=Projected()),),
        fit_tokens=512,
    )
    fit = fitted(spec)
    assert fit.basis_keys is not None
    assert fit.basis_values is not None
    assert [tuple(b.matrix.shape) for b in (fit.basis_keys, fit.basis_values)] == [(1, HEADS, 64, 64)] * 2
    assert list(fit.tensors) == [
        "mean_keys", "mean_values", "basis_keys", "weights_keys", "basis_values", "weights_values",
    ]  # fmt: skip
    assert Fit.from_tensors(fit.tensors, fit.token_start, fit.token_end) == fit
    assert fitted(CodecSpec(keys=Raw(), values=Rotated())).tensors.keys() == {"mean_keys", "mean_values"}
    plan = plan_for(spec, shape_of(64, layers=LAYERS, kv_heads=HEADS), fit)
    assert [type(p).__name__ for p in (*plan.keys, *plan.values)] == [
        "DensePlan", "SignPlan", "ProjectedPlan", "SignPlan",
    ]  # fmt: skip


def test_a_basis_changes_the_fingerprint_of_fit_and_plan():
    fit, shape = fitted(OWN), shape_of(64, layers=LAYERS, kv_heads=HEADS)
    assert fit.basis_keys is not None
    other = fitted(OWN)
    assert other == fit
    assert other.basis_keys is not None
    other.basis_keys.matrix[0, 0, 0, 0] += 1
    changed = Fit.from_tensors(other.tensors, 4, 604)
    assert changed != fit
    assert plan_for(OWN, shape, fit).fingerprint != plan_for(OWN, shape, changed).fingerprint


@pytest.mark.parametrize("d", [32, 64, 128])
def test_bases_in_half_precision_code_as_well(backend: Backend, d: int):
    """A rounded basis with its own inverse is as good: within a twentieth of one fitted to all tokens."""
    shape, x = shape_of(d, layers=LAYERS, kv_heads=HEADS), vectors(d, seed=3)[0, 1]
    found = projection(d, "none")
    plans = [
        plan_for(OWN, shape, fitted(OWN, d)),
        plan_for(
            CodecSpec(
                keys=Matryoshka(basis=f"projection:{found.sha256}"),
                values=Matryoshka(basis=f"projection:{found.sha256}"),
                mean="none",
            ),
            shape,
            None,
            (found,),
        ),
    ]
    errors = []
    for plan in plans:
        own = as_signs(plan.of(1, "keys"))
        decoded = backend.decode(SignRows(backend.encode(x, own.encoder), own.levels[0]))
        errors.append((decoded - x).square().sum().item())
    assert errors[0] <= 1.2 * errors[1]


def test_a_projection_lends_its_metric_and_budgets_to_a_session():
    found = projection(64)
    codec = Matryoshka(basis=f"session:{found.sha256}")
    spec = CodecSpec(keys=codec, values=codec, fit_tokens=512)
    shape = shape_of(64, layers=LAYERS, kv_heads=HEADS)
    fit = fitted(spec, 64, found)
    assert fit.basis_keys is not None
    assert fit.basis_keys.matrix.abs().amax((2, 3)).max() <= 1
    plan = plan_for(spec, shape, fit, (found,))
    lent = CodecSpec(
        keys=Matryoshka(basis=f"projection:{found.sha256}"),
        values=Matryoshka(basis=f"projection:{found.sha256}"),
        mean="none",
    )
    for layer in range(LAYERS):
        own, other = plan.of(layer, "keys"), plan_for(lent, shape, None, (found,)).of(layer, "keys")
        assert as_signs(own).layout == as_signs(other).layout
        assert as_signs(own).debias == 0.0


def test_a_session_basis_needs_512_tokens_and_session_means():
    with pytest.raises(ValidationError, match="fit_tokens must be at least 512"):
        CodecSpec(keys=Matryoshka(), values=Raw())
    with pytest.raises(ValidationError, match="mean must be 'session'"):
        CodecSpec(keys=Raw(), values=Projected(), mean="none", fit_tokens=512)


def test_a_fit_without_the_bases_is_refused():
    fit = fitted(CodecSpec(keys=Raw(), values=Rotated()))
    with pytest.raises(ValueError, match="the fit has no basis of the keys of 2 layers"):
        plan_for(OWN, shape_of(64, layers=LAYERS, kv_heads=HEADS), fit)


@pytest.mark.parametrize("lent", [False, True])
def test_a_session_that_begins_with_equal_tokens_takes_others_later(backend: Backend, lent: bool):
    """Nothing was seen to vary, which must not make what varies later too large to store."""
    found = projection(64)
    codec = Matryoshka(basis=f"session:{found.sha256}" if lent else "session")
    spec = CodecSpec(keys=codec, values=codec, fit_tokens=512)
    same = torch.ones(LAYERS, 600, HEADS, 64)
    fit = fit_session(spec, same, same, 4, (found,))
    plan = plan_for(spec, shape_of(64, layers=LAYERS, kv_heads=HEADS), fit, (found,) if lent else ())
    own = as_signs(plan.of(0, "keys"))
    for x in (same[0, :5], vectors(64)[0, 0, :50]):
        decoded = backend.decode(SignRows(backend.encode(x, own.encoder), own.levels[0]))
        assert decoded.isfinite().all()
        assert (decoded - x).norm() <= 2 * (x - 1).norm() + 1e-3
