"""Decoding behind a stored prefix equals decoding with the whole cache in the process."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")

from kvstore_client.integrations.model_shape import fingerprint_of, shape_of  # noqa: E402
from kvstore_client.integrations.transformers import (  # noqa: E402
    ATTENTION,
    StoreCache,
    append_prefix,
    local_attention,
)
from kvstore_codecs.spec import ModelShape  # noqa: E402

PREFIX = 37


class ExactSession:
    """A session in this process that keeps keys and values [layers, tokens, H, D] exactly."""

    def __init__(self, shape: ModelShape) -> None:
        self._k = self._v = torch.empty((shape.layers, 0, shape.kv_heads, shape.head_dim))
        self.name, self.shape = "exact", shape
        self.ends: list[int] = []
        """What each query attended to."""

    @property
    def length(self) -> int:
        return self._k.shape[1]

    def append(self, k: Tensor, v: Tensor, *, start: int | None = None) -> int:
        assert start in (None, self.length)
        self._k, self._v = torch.cat([self._k, k.float()], 1), torch.cat([self._v, v.float()], 1)
        return self.length

    def attend(self, layer: int, q: Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Softmax attention in float64 over [0, end)."""
        end = self.length if end is None else end
        self.ends.append(end)
        groups = q.shape[1] // self.shape.kv_heads
        k = self._k[layer, :end].double().repeat_interleave(groups, dim=1)
        v = self._v[layer, :end].double().repeat_interleave(groups, dim=1)
        logits = torch.einsum("thd,nhd->thn", q.double(), k) * self.shape.sm_scale
        out = torch.einsum("thn,nhd->thd", logits.softmax(-1), v)
        return out.to(q.dtype), torch.logsumexp(logits, -1).float()


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes))).eval()
    model.set_attn_implementation(ATTENTION)
    return model


def token_ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prefilled(model: Any, ids: Tensor) -> tuple[ExactSession, Any]:
    """A session holding `ids` and the local cache that was appended to it."""
    cache = transformers.DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    session = ExactSession(shape_of(model))
    append_prefix(session, cache)
    return session, cache


@torch.no_grad()
def logits_in_steps(model: Any, cache: Any, ids: Tensor, steps: list[int]) -> Tensor:
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(steps, dim=1)], dim=1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("steps", [[1] * 9, [9], [4, 1, 3, 1]], ids=["one by one", "all at once", "mixed"])
def test_a_stored_prefix_gives_the_logits_of_a_local_one(kv_heads: int, steps: list[int]) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads)
    session, local = prefilled(model, token_ids(PREFIX))
    ids = token_ids(9, seed=2)
    remote = logits_in_steps(model, StoreCache(session, model), ids, steps)
    torch.testing.assert_close(remote, logits_in_steps(model, local, ids, steps), atol=2e-5, rtol=0)


def test_an_empty_session_is_plain_decoding() -> None:
    model = tiny_llama()
    session, ids = ExactSession(shape_of(model)), token_ids(12)
    whole = logits_in_steps(model, transformers.DynamicCache(config=model.config), ids, [12])
    remote = logits_in_steps(model, StoreCache(session, model), ids, [5, 1, 6])
    torch.testing.assert_close(remote, whole, atol=2e-5, rtol=0)
    assert not session.ends


def test_bfloat16_models_merge_in_float32() -> None:
    exact, model = tiny_llama(), tiny_llama().to(torch.bfloat16)
    session, local = prefilled(model, token_ids(PREFIX))
    ids = token_ids(6, seed=2)
    expected = logits_in_steps(exact, prefilled(exact, token_ids(PREFIX))[1], ids, [6])
    remote = (logits_in_steps(model, StoreCache(session, model), ids, [6]) - expected).abs().mean()
    plain = (logits_in_steps(model, local, ids, [6]) - expected).abs().mean()
    assert remote <= 2 * plain


def test_logit_soft_caps_are_applied_on_both_sides() -> None:
    q, k, v = (torch.randn(n, 2, 32, generator=torch.Generator().manual_seed(n)) for n in (3, 4, 5))
    k, v = k.transpose(0, 1), v[:4].transpose(0, 1)
    out, lse = local_attention(q, k, v, torch.ones(1, 1, 3, 4, dtype=torch.bool), 0.5, 2.0)
    logits = 2.0 * torch.tanh(torch.einsum("thd,hnd->thn", q, k) * 0.5 / 2.0)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("thn,hnd->thd", logits.softmax(-1), v))


def test_all_layers_of_all_steps_attend_to_the_pinned_end_while_the_session_grows() -> None:
    model = tiny_llama()
    session, local = prefilled(model, token_ids(PREFIX))
    cache = StoreCache(session, model)
    grown = torch.randn(2, 5, 2, 32)
    session.append(grown, grown)
    ids = token_ids(3, seed=2)
    remote = logits_in_steps(model, cache, ids, [1, 2])
    assert set(session.ends) == {PREFIX}
    torch.testing.assert_close(remote, logits_in_steps(model, local, ids, [1, 2]), atol=2e-5, rtol=0)


def test_an_earlier_end_reads_a_shorter_prefix() -> None:
    model = tiny_llama()
    ids = token_ids(PREFIX)
    session, _ = prefilled(model, ids)
    remote = logits_in_steps(model, StoreCache(session, model, end=20), ids[:, 20:], [PREFIX - 20])
    whole = logits_in_steps(model, transformers.DynamicCache(config=model.config), ids, [PREFIX])
    torch.testing.assert_close(remote, whole[:, 20:], atol=2e-5, rtol=0)


def test_flushing_moves_the_local_tokens_behind_the_prefix() -> None:
    model = tiny_llama()
    session, local = prefilled(model, token_ids(PREFIX))
    cache, ids = StoreCache(session, model), token_ids(8, seed=2)
    before = logits_in_steps(model, cache, ids[:, :5], [4, 1])
    assert (cache.flush(), cache.flush()) == (PREFIX + 5, PREFIX + 5)
    assert (session.length, cache.local_tokens) == (PREFIX + 5, 0)
    after = logits_in_steps(model, cache, ids[:, 5:], [3])
    whole = logits_in_steps(model, local, ids, [8])
    torch.testing.assert_close(torch.cat([before, after], dim=1), whole, atol=2e-5, rtol=0)


def test_generate_continues_behind_the_prefix() -> None:
    model = tiny_llama()
    ids, question = token_ids(PREFIX), token_ids(4, seed=2)
    session, _ = prefilled(model, ids)
    # generate() counts positions by its ids: those of the prefix are never read.
    unread = torch.cat([torch.ones_like(ids), question], dim=1)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    remote = model.generate(unread, past_key_values=StoreCache(session, model), **settings)
    whole = model.generate(torch.cat([ids, question], dim=1), **settings)
    assert remote[0, -8:].tolist() == whole[0, -8:].tolist()


def test_a_session_of_another_shape_is_refused_by_field() -> None:
    model = tiny_llama()
    wrong = shape_of(model).model_copy(update={"kv_heads": 4, "dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"kv_heads is 2 in the model and 4 in the session; dtype is float32"):
        StoreCache(ExactSession(wrong), model)


def test_a_prefilled_cache_of_another_shape_is_refused() -> None:
    model, other = tiny_llama(), tiny_llama(num_key_value_heads=4)
    cache = transformers.DynamicCache(config=other.config)
    other(token_ids(3), past_key_values=cache)
    with pytest.raises(ValueError, match="2 KV heads and head_dim 32; the cache has 2, 4 and 32"):
        append_prefix(ExactSession(shape_of(model)), cache)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(1, 3), "attention_mask has 3 positions, prefix and new tokens are 40"),
        (torch.ones(1, 40).index_fill(1, torch.tensor([2]), 0), "hides some of the 37 stored positions"),
    ],
)
def test_a_padding_mask_that_the_store_cannot_honour_is_refused(mask: Tensor, reason: str) -> None:
    model = tiny_llama()
    session, _ = prefilled(model, token_ids(PREFIX))
    with pytest.raises(ValueError, match=reason):
        model(token_ids(3), past_key_values=StoreCache(session, model), attention_mask=mask)


def test_a_batch_of_two_and_an_impossible_crop_are_refused() -> None:
    model = tiny_llama()
    session, _ = prefilled(model, token_ids(PREFIX))
    cache = StoreCache(session, model)
    with pytest.raises(ValueError, match="a batch of 2"):
        model(token_ids(3).repeat(2, 1), past_key_values=cache)
    model(token_ids(3), past_key_values=cache)
    with pytest.raises(ValueError, match="only 3 are behind the stored prefix"):
        cache.crop(-4)
    cache.crop(-2)
    assert cache.get_seq_length() == PREFIX + 1


def test_sliding_window_models_are_refused() -> None:
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32
    )
    with pytest.raises(ValueError, match="every layer must attend to the whole prefix"):
        shape_of(transformers.MistralForCausalLM(config))


def test_the_shape_follows_the_model() -> None:
    shape = shape_of(tiny_llama(num_key_value_heads=1).to(torch.bfloat16), fingerprint="tiny")
    sizes = (shape.layers, shape.kv_heads, shape.query_heads, shape.head_dim, shape.dtype, shape.model_fingerprint)
    assert sizes == (2, 1, 4, 32, "bfloat16", "tiny")
    assert shape.sm_scale == pytest.approx(32**-0.5)


def test_fingerprints_name_the_weights_and_the_rope() -> None:
    model = tiny_llama()
    tuned = copy.deepcopy(model)
    tuned.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    other_rope = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert fingerprint_of(model) == fingerprint_of(tiny_llama())
    assert len({fingerprint_of(each) for each in (model, tuned, other_rope)}) == 3
