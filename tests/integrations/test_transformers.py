"""Decoding behind a stored prefix equals decoding with the whole cache in the process."""

import copy

import pytest
import torch
from torch import Tensor

from kvstore_client import Unavailable

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")

from kvstore_client.integrations.model_shape import fingerprint_of, shape_of  # noqa: E402
from kvstore_client.integrations.transformers import (  # noqa: E402
    StoreCache,
    append_prefix,
    local_attention,
)

from .tiny import PREFIX, ExactSession, assert_same, logits_in_steps, prefilled, tiny_llama, token_ids  # noqa: E402


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("steps", [[1] * 9, [9], [4, 1, 3, 1]], ids=["one by one", "all at once", "mixed"])
def test_a_stored_prefix_gives_the_logits_of_a_local_one(kv_heads: int, steps: list[int]) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads)
    session, local = prefilled(model, token_ids(PREFIX))
    ids = token_ids(9, seed=2)
    remote = logits_in_steps(model, StoreCache(session, model), ids, steps)
    assert_same(remote, logits_in_steps(model, local, ids, steps))


def test_an_empty_session_is_plain_decoding() -> None:
    model = tiny_llama()
    session, ids = ExactSession(shape_of(model)), token_ids(12)
    whole = logits_in_steps(model, transformers.DynamicCache(config=model.config), ids, [12])
    remote = logits_in_steps(model, StoreCache(session, model), ids, [5, 1, 6])
    assert_same(remote, whole)
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
    assert_same(remote, logits_in_steps(model, local, ids, [1, 2]))


def test_an_earlier_end_reads_a_shorter_prefix() -> None:
    model = tiny_llama()
    ids = token_ids(PREFIX)
    session, _ = prefilled(model, ids)
    remote = logits_in_steps(model, StoreCache(session, model, end=20), ids[:, 20:], [PREFIX - 20])
    whole = logits_in_steps(model, transformers.DynamicCache(config=model.config), ids, [PREFIX])
    assert_same(remote, whole[:, 20:])


def test_a_step_that_the_store_does_not_answer_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    session, local = prefilled(model, token_ids(PREFIX))
    cache, ids, answer = StoreCache(session, model), token_ids(5, seed=2), session.attend

    def fails_at_layer_1(layer: int, q: Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]:
        if layer == 1:
            raise Unavailable("gone")
        return answer(layer, q, end=end)

    before = logits_in_steps(model, cache, ids[:, :2], [2])
    monkeypatch.setattr(session, "attend", fails_at_layer_1)
    with pytest.raises(Unavailable):
        model(ids[:, 2:], past_key_values=cache)
    assert cache.local_tokens == 2
    monkeypatch.undo()
    after = logits_in_steps(model, cache, ids[:, 2:], [3])
    assert_same(torch.cat([before, after], dim=1), logits_in_steps(model, local, ids, [5]))


def test_flushing_moves_the_local_tokens_behind_the_prefix() -> None:
    model = tiny_llama()
    session, local = prefilled(model, token_ids(PREFIX))
    cache, ids = StoreCache(session, model), token_ids(8, seed=2)
    before = logits_in_steps(model, cache, ids[:, :5], [4, 1])
    assert (cache.flush(), cache.flush()) == (PREFIX + 5, PREFIX + 5)
    assert (session.length, cache.local_tokens) == (PREFIX + 5, 0)
    after = logits_in_steps(model, cache, ids[:, 5:], [3])
    whole = logits_in_steps(model, local, ids, [8])
    assert_same(torch.cat([before, after], dim=1), whole)


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
