"""What codecs do to attention: softmax noise, means, GQA groups, edges."""

import math
from dataclasses import replace

import pytest
import torch

from kvstore_codecs.plan import SignPlan
from kvstore_codecs.spec import Affine, Qjl, Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.merge import merge_states
from kvstore_kernels.types import DenseRows, ScaleRangeError, SignRows
from tests.codecs.inputs import SignCodec, seeded, sign_plan, stored_variance

KEY_CODECS = [
    Qjl(bits=256),
    Qjl(bits=256, scale="paper", outlier_channels=(2, 9)),
    Rotated(planes=2),
    Rotated(planes=4),
    Affine(planes=4),
]


def encoded(backend: Backend, plan: SignPlan, x: torch.Tensor, level: int = 0) -> SignRows:
    return SignRows(backend.encode(x, plan.encoder), plan.levels[level])


def with_mean(plan: SignPlan, mean: torch.Tensor) -> SignPlan:
    levels = tuple(replace(level, mean=mean) for level in plan.levels)
    return SignPlan(plan.layout, replace(plan.encoder, mean=mean), levels)


@pytest.mark.parametrize("codec", [Rotated(planes=3), Rotated(planes=4), Qjl(bits=1024)], ids=str)
def test_kl_is_what_the_promised_variance_predicts(backend: Backend, codec: SignCodec):
    """KL(p || p^) = sigma^2 / 2 (1 - sum p^2) for small sigma, averaged over 2,000 queries and several sets of keys."""
    d, tokens = 128, 64
    plan = sign_plan(codec, d)
    measured, predicted = [], []
    for draw in range(8):
        keys = torch.randn(tokens, 1, d, generator=seeded(draw))
        q = torch.randn(250, 1, d, generator=seeded(100 + draw))
        rows = encoded(backend, plan, keys)
        sigma = 0.15
        variance = stored_variance(q, rows.expansion, rows.signs.scales)[:, 0].double()
        sm_scale = sigma / variance.mean().sqrt().item()
        exact = (q[:, 0].double() @ keys[:, 0].double().T * sm_scale).log_softmax(dim=1)
        noisy = backend.score(q, rows, sm_scale=sm_scale)[:, 0].double().log_softmax(dim=1)
        measured.append((exact.exp() * (exact - noisy)).sum(dim=1))
        predicted.append(variance * sm_scale**2 / 2 * (1 - exact.exp().square().sum(dim=1)))
    assert torch.cat(measured).mean().item() == pytest.approx(torch.cat(predicted).mean().item(), rel=0.05)


@pytest.mark.parametrize("codec", KEY_CODECS, ids=str)
def test_permuting_tokens_permutes_scores_exactly(backend: Backend, codec: SignCodec):
    plan, keys = sign_plan(codec, 64), torch.randn(75, 1, 64, generator=seeded(1))
    q, order = torch.randn(3, 1, 64, generator=seeded(2)), torch.randperm(75, generator=seeded(3))
    scores = backend.score(q, encoded(backend, plan, keys), sm_scale=0.1)
    moved = backend.score(q, encoded(backend, plan, keys[order]), sm_scale=0.1)
    assert torch.equal(moved, scores[..., order])


@pytest.mark.parametrize("codec", KEY_CODECS, ids=str)
def test_a_mean_that_all_keys_share_changes_no_probability(backend: Backend, codec: SignCodec):
    plan, keys = sign_plan(codec, 64), torch.randn(40, 1, 64, generator=seeded(4))
    q, mean = torch.randn(5, 1, 64, generator=seeded(5)), torch.randn(1, 64, generator=seeded(6))
    plain = backend.score(q, encoded(backend, plan, keys), sm_scale=0.125)
    shifted = backend.score(q, encoded(backend, with_mean(plan, mean), keys + mean), sm_scale=0.125)
    offset = torch.einsum("thd,hd->th", q, mean)[..., None] * 0.125
    assert (shifted - offset - plain).abs().max() <= 2e-3 * plain.abs().max()
    assert (shifted.softmax(dim=-1) - plain.softmax(dim=-1)).abs().max() <= 2e-3


@pytest.mark.parametrize("codec", [Rotated(planes=4), Affine(planes=4), Qjl(bits=512)], ids=str)
def test_a_value_mean_comes_back_whole(backend: Backend, codec: SignCodec):
    """o = (sum p) mu + ...: values that are all the mean give the mean, whatever the weights."""
    mean = 5 * torch.randn(1, 64, generator=seeded(7))
    plan = with_mean(sign_plan(codec, 64), mean)
    keys = DenseRows(torch.randn(30, 1, 64, generator=seeded(8)))
    values = encoded(backend, plan, mean.expand(30, 1, 64))
    out, _ = backend.attend(torch.randn(2, 1, 64, generator=seeded(9)), keys, values, sm_scale=0.125)
    assert (out - mean).abs().max() <= 1e-4


@pytest.mark.parametrize("group", [1, 4, 5, 7, 8, 16])
def test_a_group_of_query_heads_scores_as_each_head_alone(backend: Backend, group: int):
    plan = sign_plan(Rotated(planes=3), 64, kv_heads=2)
    rows = encoded(backend, plan, torch.randn(50, 2, 64, generator=seeded(10)))
    q = torch.randn(2, 2 * group, 64, generator=seeded(11))
    together = backend.score(q, rows, sm_scale=0.125)
    for member in range(group):
        alone = backend.score(q[:, member::group].contiguous(), rows, sm_scale=0.125)
        assert (alone - together[:, member::group]).abs().max() <= 1e-6


@pytest.mark.parametrize("codec", KEY_CODECS, ids=str)
def test_zero_keys_score_zero_at_every_level(backend: Backend, codec: SignCodec):
    plan, q = sign_plan(codec, 64), torch.randn(2, 1, 64, generator=seeded(12))
    for level in range(len(plan.levels)):
        assert not backend.score(q, encoded(backend, plan, torch.zeros(3, 1, 64), level), sm_scale=1.0).any()


@pytest.mark.parametrize("codec", KEY_CODECS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 31, 33])
def test_any_number_of_tokens_can_be_stored_and_read(backend: Backend, codec: SignCodec, count: int):
    plan = sign_plan(codec, 96, kv_heads=2)
    rows = encoded(backend, plan, torch.randn(count, 2, 96, generator=seeded(13)))
    q = torch.randn(1, 4, 96, generator=seeded(14))
    assert backend.score(q, rows, sm_scale=0.1).shape == (1, 4, count)
    out, lse = backend.attend(q, rows, rows, sm_scale=0.1)
    assert out.shape == (1, 4, 96)
    assert lse.isfinite().all() if count else (lse == -math.inf).all() and not out.any()


@pytest.mark.parametrize("codec", KEY_CODECS, ids=str)
def test_keys_near_the_largest_half_are_stored_or_refused(backend: Backend, codec: SignCodec):
    """One huge channel is fine; a vector that no fp16 scale can hold is refused by token and head."""
    plan = sign_plan(codec, 64)
    x = torch.randn(3, 1, 64, generator=seeded(15))
    x[1, 0, 5] = 65_000.0
    decoded = backend.decode(encoded(backend, plan, x))
    assert decoded.isfinite().all()
    x[2] = 1e7 * torch.randn(1, 64, generator=seeded(16))
    with pytest.raises(ScaleRangeError) as error:
        backend.encode(x, plan.encoder)
    assert (error.value.token, error.value.head) == (2, 0)


def test_exact_compressed_and_recent_tokens_merge_into_one_softmax(backend: Backend):
    """Sinks kept exactly, sketches, a worker's own fp16 tail: the same as one softmax over all their logits."""
    sinks, middle, tail = torch.randn(100, 1, 64, generator=seeded(17)).split([4, 80, 16])
    tail = tail.half()
    plan, q = sign_plan(Rotated(planes=4), 64), torch.randn(3, 2, 64, generator=seeded(18))
    parts = [DenseRows(sinks), encoded(backend, plan, middle), DenseRows(tail)]
    out, lse = merge_states([backend.attend(q, rows, rows, sm_scale=0.125) for rows in parts])
    logits = torch.cat([backend.score(q, rows, sm_scale=0.125) for rows in parts], dim=-1).double()
    values = torch.cat([backend.decode(rows) for rows in parts]).double()
    expected = torch.einsum("thn,nd->thd", logits.softmax(dim=-1), values[:, 0])
    assert (lse - logits.logsumexp(dim=-1)).abs().max() <= 1e-5
    assert (out - expected).abs().max() <= 1e-5 * values.abs().max()


def test_debias_takes_half_the_promised_variance_off_each_logit(backend: Backend):
    plan, q = sign_plan(Qjl(bits=256), 64), torch.randn(2, 1, 64, generator=seeded(19))
    keys = torch.randn(20, 1, 64, generator=seeded(20))
    rows = encoded(backend, plan, keys)
    logits = backend.score(q, rows, sm_scale=0.2)
    each = [stored_variance(q, rows.expansion, rows.signs.scales[n : n + 1]) for n in range(20)]
    expected = (logits - 0.5 / 2 * 0.2**2 * torch.stack(each, dim=-1)).logsumexp(dim=-1)
    _, lse = backend.attend(q, rows, rows, sm_scale=0.2, debias=0.5)
    assert (lse - expected).abs().max() <= 1e-4
