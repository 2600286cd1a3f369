"""Scores of and attention over vectors kept as numbers, against float64."""

import pytest
import torch
from torch import Tensor

from kvstore_kernels.cuda import dense
from kvstore_kernels.types import DenseRows
from tests.gpu import inputs
from tests.gpu.inputs import worst
from tests.kernels.inputs import SIZES, attention64, logits64, normal, strided

inputs.require_device()
pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
every_group = pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])


def vectors(tokens: int, head_dim: int = 128, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return normal(tokens, 2, head_dim, seed=seed).to(dtype).to(inputs.DEVICE)


def queries(tokens: int = 3, group: int = 4, head_dim: int = 128, dtype: torch.dtype = torch.float16) -> Tensor:
    return normal(tokens, 2 * group, head_dim, seed=5).to(dtype).to(inputs.DEVICE)


def plain_logits(q: Tensor, keys: Tensor, sm_scale: float, cap: float) -> Tensor:
    """In float32."""
    rows = q.cpu().float().unflatten(1, (2, -1))
    logits = torch.einsum("thgd,nhd->thgn", rows, keys.cpu().float()).flatten(1, 2) * sm_scale
    return cap * torch.tanh(logits / cap) if cap else logits


def assert_scores(q: Tensor, keys: Tensor, sm_scale: float = 0.125, cap: float = 0.0) -> None:
    """At most twice the error of plain float32."""
    truth = logits64(q.cpu(), DenseRows(keys.cpu()), sm_scale, cap)
    actual = dense.score(q, keys, sm_scale=sm_scale, logit_soft_cap=cap)
    assert actual.dtype == torch.float32
    assert worst(actual, truth) <= 2 * worst(plain_logits(q, keys, sm_scale, cap), truth)


def assert_attends(q: Tensor, keys: Tensor, values: Tensor, sm_scale: float = 0.125, cap: float = 0.0) -> None:
    """At most twice the error of plain float32, whose exponentials are exact to a part in ten million."""
    logits, plain = logits64(q.cpu(), DenseRows(keys.cpu()), sm_scale, cap), plain_logits(q, keys, sm_scale, cap)
    out, lse = attention64(logits, DenseRows(values.cpu()))
    x = values.cpu().float()
    plain_out = torch.einsum("thgn,nhd->thgd", torch.softmax(plain, 2).unflatten(1, (2, -1)), x).flatten(1, 2)
    actual = dense.attend(q, keys, values, sm_scale=sm_scale, logit_soft_cap=cap)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert worst(actual[0], out) <= 2 * worst(plain_out, out) + 1e-6 * float(x.abs().max())
    assert worst(actual[1], lse) <= 1e-6 * (1 + float(logits.abs().max()))


@every_dtype
@pytest.mark.parametrize("tokens", [*SIZES, 31, 32, 33, 5000])
def test_every_token_count_and_type(tokens: int, dtype: torch.dtype) -> None:
    q, keys, values = queries(dtype=dtype), vectors(tokens, dtype=dtype), vectors(tokens, seed=7, dtype=dtype)
    assert_scores(q, keys)
    if tokens:
        assert_attends(q, keys, values)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 160, 192, 224, 256])
def test_every_head_dim(head_dim: int) -> None:
    q, keys, values = queries(2, 3, head_dim), vectors(300, head_dim), vectors(300, head_dim, seed=7)
    assert_scores(q, keys)
    assert_attends(q, keys, values)


def test_queries_keys_and_values_of_different_types() -> None:
    q, keys, values = queries(dtype=torch.float32), vectors(300), vectors(300, seed=7, dtype=torch.bfloat16)
    assert_scores(q, keys)
    assert_attends(q, keys, values)


@pytest.mark.parametrize("cap", [20.0, 50.0])
def test_the_soft_cap(cap: float) -> None:
    q, keys, values = 20 * queries(), vectors(300), vectors(300, seed=7)
    assert dense.score(q, keys, sm_scale=0.125, logit_soft_cap=cap).abs().max() <= cap
    assert_scores(q, keys, cap=cap)
    assert_attends(q, keys, values, cap=cap)


@every_group
def test_grouped_query_heads_are_answered_as_each_alone(group: int) -> None:
    q, keys, values = queries(2, group), vectors(700), vectors(700, seed=7)
    scores, (out, lse) = dense.score(q, keys, sm_scale=0.125), dense.attend(q, keys, values, sm_scale=0.125)
    for g in range(group):
        own = q[:, g::group]
        alone = dense.attend(own, keys, values, sm_scale=0.125)
        assert torch.equal(dense.score(own, keys, sm_scale=0.125), scores[:, g::group])
        assert torch.equal(alone[0], out[:, g::group])
        assert torch.equal(alone[1], lse[:, g::group])


@pytest.mark.parametrize("workers", [1, 3, 8, 32])
def test_a_worker_s_rows_are_answered_alone_as_among_others(workers: int) -> None:
    q, keys, values = queries(workers), vectors(5000), vectors(5000, seed=7)
    scores, (out, lse) = dense.score(q, keys, sm_scale=0.125), dense.attend(q, keys, values, sm_scale=0.125)
    for worker in {0, workers // 2, workers - 1}:
        own = q[worker : worker + 1]
        alone = dense.attend(own, keys, values, sm_scale=0.125)
        assert torch.equal(dense.score(own, keys, sm_scale=0.125)[0], scores[worker])
        assert torch.equal(alone[0][0], out[worker])
        assert torch.equal(alone[1][0], lse[worker])


def test_one_token_far_above_all_others_is_the_answer() -> None:
    q, keys, values = queries(), vectors(2000), vectors(2000, seed=7)
    keys[1234] = q[0, 0]
    assert_attends(30 * q, keys, values, sm_scale=0.5)


def test_no_tokens_give_zero_and_minus_infinity() -> None:
    q = queries()
    out, lse = dense.attend(q, vectors(0), vectors(0), sm_scale=0.125)
    assert torch.equal(out, torch.zeros_like(q, dtype=torch.float32))
    assert torch.equal(lse, torch.full(q.shape[:2], -torch.inf, device=q.device))
    assert dense.attend(q[:0], vectors(5), vectors(5), sm_scale=0.125)[0].shape == (0, 8, 128)


def test_strided_and_unaligned_input() -> None:
    q, keys, values = queries(), vectors(100), vectors(100, seed=7)
    expected = dense.attend(q, keys, values, sm_scale=0.125)
    unaligned = torch.cat([keys.flatten()[:1], keys.flatten()])[1:].view_as(keys)
    for apart in (strided(keys), unaligned):
        actual = dense.attend(strided(q), apart, strided(values), sm_scale=0.125)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(dense.score(q, apart, sm_scale=0.125), dense.score(q, keys, sm_scale=0.125))


def test_what_the_kernels_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="keys have shape"):
        dense.attend(queries(), vectors(5), vectors(6), sm_scale=1.0)
    with pytest.raises(ValueError, match="q has shape"):
        dense.score(queries(head_dim=64), vectors(5), sm_scale=1.0)
    with pytest.raises(ValueError, match="head_dim is 48"):
        dense.score(queries(head_dim=48), vectors(5, 48), sm_scale=1.0)
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        dense.score(queries(), vectors(5).double(), sm_scale=1.0)
