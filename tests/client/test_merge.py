import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvstore_client import from_flashinfer, merge, to_flashinfer, to_sglang, to_vllm

T, HEADS, D = 3, 4, 32


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """float64 truth: out [T, H, D], natural lse [T, H] for k, v [N, H, D]."""
    logits = torch.einsum("thd,nhd->thn", q.double(), k.double()) * D**-0.5
    lse = torch.logsumexp(logits, dim=-1)
    return torch.einsum("thn,nhd->thd", torch.exp(logits - lse.unsqueeze(-1)), v.double()), lse


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(T, HEADS, D), 3 * torch.randn(100, HEADS, D), torch.randn(100, HEADS, D)


def parts(tensors: tuple[Tensor, Tensor, Tensor], *cuts: int, dtype: torch.dtype = torch.float32):
    q, k, v = tensors
    edges = [0, *cuts, len(k)]
    answers = [attention(q, k[a:b], v[a:b]) for a, b in pairwise(edges)]
    return [(out.to(dtype), lse.float()) for out, lse in answers]


def test_parts_merge_into_attention_over_all_tokens(tensors: tuple[Tensor, Tensor, Tensor]):
    truth, truth_lse = attention(*tensors)
    for cuts in ((50,), (1, 99), (10, 20, 30)):
        out, lse = merge(parts(tensors, *cuts))
        assert (out - truth).abs().max() < 1e-6
        assert (lse - truth_lse).abs().max() < 1e-5


def test_order_does_not_matter_and_out_keeps_its_dtype(tensors: tuple[Tensor, Tensor, Tensor]):
    states = parts(tensors, 30, 60, dtype=torch.bfloat16)
    out, lse = merge(states)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    turned, turned_lse = merge(states[::-1])
    assert torch.allclose(out.float(), turned.float(), atol=1e-2)
    assert torch.allclose(lse, turned_lse)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
def test_an_empty_part_changes_nothing_whatever_its_out_holds(tensors: tuple[Tensor, Tensor, Tensor], empty: float):
    ((out, lse),) = parts(tensors)
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, empty)
    for states in ([(out, lse), nothing], [nothing, (out, lse)]):
        merged, merged_lse = merge(states)
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
def test_only_empty_parts_give_zero_and_minus_infinity(empty: float):
    nothing = torch.full((T, HEADS, D), 7.0), torch.full((T, HEADS), empty)
    out, lse = merge([nothing, nothing])
    assert torch.equal(out, torch.zeros(T, HEADS, D))
    assert torch.equal(lse, torch.full((T, HEADS), -torch.inf))


def test_huge_logits_do_not_overflow():
    out, lse = torch.ones(T, HEADS, D), torch.full((T, HEADS), 3e4)
    merged, merged_lse = merge([(out, lse), (3 * out, lse)])
    assert torch.allclose(merged, 2 * out, rtol=1e-3), "float32 resolves 0.002 at 3e4"
    assert torch.allclose(merged_lse, lse + math.log(2))


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="nothing"):
        merge([])


def test_vllm_s_formula_on_head_major_lse_gives_the_same(tensors: tuple[Tensor, Tensor, Tensor]):
    states = parts(tensors, 40)
    (prefix, prefix_lse), (suffix, suffix_lse) = (to_vllm(*state) for state in states)
    assert prefix_lse.shape == (HEADS, T)
    top = torch.maximum(prefix_lse, suffix_lse)
    p, s = torch.exp(prefix_lse - top), torch.exp(suffix_lse - top)
    out = prefix * (p / (p + s)).t().unsqueeze(-1) + suffix * (s / (p + s)).t().unsqueeze(-1)
    merged, lse = merge(states)
    assert torch.allclose(out, merged, atol=1e-6)
    assert torch.allclose((torch.log(p + s) + top).t(), lse)


def test_flashinfer_s_base_two_formula_gives_the_same(tensors: tuple[Tensor, Tensor, Tensor]):
    states = parts(tensors, 40)
    (a, s_a), (b, s_b) = (to_flashinfer(*state) for state in states)
    top = torch.maximum(s_a, s_b)
    w_a, w_b = torch.exp2(s_a - top), torch.exp2(s_b - top)
    out = (a * w_a.unsqueeze(-1) + b * w_b.unsqueeze(-1)) / (w_a + w_b).unsqueeze(-1)
    merged, lse = merge(states)
    assert torch.allclose(out, merged, atol=1e-6)
    assert torch.allclose(from_flashinfer(out, top + torch.log2(w_a + w_b))[1], lse)


def test_sglang_takes_it_as_it_is(tensors: tuple[Tensor, Tensor, Tensor]):
    ((out, lse),) = parts(tensors)
    assert to_sglang(out, lse) == (out, lse)
