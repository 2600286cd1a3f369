"""QJL with a second sketch for outlier channels."""

import pytest
import torch

from kvstore_codecs.spec import Qjl
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import SignEncoder, SignRows
from tests.codecs.inputs import seeded, sign_plan

D, OUTLIERS = 128, (3, 50, 77, 100)
SPLIT = Qjl(bits=256, outlier_channels=OUTLIERS, outlier_bits=256)


def outlier_keys(count: int, factor: float = 10.0) -> torch.Tensor:
    x = torch.randn(count, 1, D, generator=seeded(1))
    x[..., OUTLIERS] *= factor
    return x


def score_errors(backend: Backend, codec: Qjl, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    plan = sign_plan(codec, D)
    decoded = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0]))
    return torch.einsum("qd,nd->qn", q.double(), (decoded - x)[:, 0].double())


def test_a_split_quarters_the_variance_with_four_channels_ten_times_as_large(backend: Backend):
    x, q = outlier_keys(4000), torch.randn(200, D, generator=seeded(2))
    split = score_errors(backend, SPLIT, x, q).var()
    whole = score_errors(backend, Qjl(bits=256), x, q).var()
    assert (split / whole).item() == pytest.approx(0.25, abs=0.05)


def test_both_sketches_have_disjoint_supports_and_add_up(backend: Backend):
    plan = sign_plan(SPLIT, D)
    assert isinstance(plan.encoder, SignEncoder)
    inliers, outliers = plan.encoder.support
    assert torch.equal(inliers + outliers, torch.ones(D))
    projection = plan.encoder.heads[0].projection
    assert not projection[:256, inliers.bool()].any()
    assert not projection[256:, outliers.bool()].any()
    x = outlier_keys(50)
    parts = [backend.encode(x * support, plan.encoder) for support in (inliers, outliers)]
    decoded = [backend.decode(SignRows(signs, plan.levels[0])) for signs in parts]
    together = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0]))
    assert (decoded[0] + decoded[1] - together).abs().max() <= 1e-5 * together.abs().max()


def test_inlier_scale_survives_outliers_that_hold_nearly_all_energy(backend: Backend):
    """The inlier norm is taken over inlier channels, not as a difference of two rounded norms."""
    x = outlier_keys(500, factor=560.0)
    energy = x[:, 0].square()
    share = (energy.sum(dim=1) - energy[:, list(OUTLIERS)].sum(dim=1)) / energy.sum(dim=1)
    assert share.median() < 1.5e-4
    plan = sign_plan(SPLIT.model_copy(update={"scale": "paper"}), D)
    assert isinstance(plan.encoder, SignEncoder)
    assert plan.encoder.norm_factor is not None
    stored = backend.encode(x, plan.encoder).scales[:, 0].double() / plan.encoder.norm_factor[0]
    exact = (x[:, 0].double() * plan.encoder.support[0]).norm(dim=1)
    assert ((stored - exact) / exact).abs().max() <= 1e-3


@pytest.mark.parametrize("scale", ["ip", "paper"])
@pytest.mark.parametrize("channels", [(), (5,), OUTLIERS, tuple(range(127))])
def test_scores_are_finite_with_any_number_of_outliers(backend: Backend, channels: tuple[int, ...], scale):
    plan = sign_plan(Qjl(bits=64, scale=scale, outlier_channels=channels, outlier_bits=32), D)
    x = torch.cat([torch.zeros(1, 1, D), outlier_keys(3), torch.zeros(1, 1, D)])
    x[1, 0, list(channels)] = 0
    signs = backend.encode(x, plan.encoder)
    scores = backend.score(torch.randn(2, 1, D, generator=seeded(3)), SignRows(signs, plan.levels[0]), sm_scale=1.0)
    assert scores.isfinite().all()
    assert not scores[:, :, [0, -1]].any()


def test_the_norm_rule_is_unbiased_for_few_outliers(backend: Backend):
    """Four channels are too few for sqrt(pi/2); their sketch has the constant of its own dimension."""
    x = torch.zeros(20_000, 1, D)
    x[..., OUTLIERS] = torch.randn(20_000, 1, 4, generator=seeded(4))
    plan = sign_plan(SPLIT.model_copy(update={"scale": "paper"}), D)
    decoded = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0]))
    ratio = ((decoded * x).sum(dim=-1) / x.square().sum(dim=-1)).double()
    assert abs(ratio.mean() - 1) <= 4 * ratio.std() / len(x) ** 0.5 + 1e-3
