"""Decode a transformers model whose long prefix is in the store and whose recent tokens are local.

    model.set_attn_implementation(ATTENTION)
    append_prefix(session, prefilled)                       # once, by the worker that read the long context
    cache = StoreCache(session, model)                      # in any worker
    model(ids, past_key_values=cache)                       # positions go on at the prefix's length

Every layer asks the store for its attention over [0, end), computes its own over the local tokens, and merges both by
their log-sum-exp in float32. `end` is one for all layers and steps, so no token is counted twice. One sequence a cache.
With any other cache the implementation is `sdpa`.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvstore_client.integrations.model_shape import differences, shape_of
from kvstore_client.merge import merge
from kvstore_codecs.spec import ModelShape

ATTENTION = "kvstore"
"""The name to give to `set_attn_implementation` or `attn_implementation=`."""
NOT_MERGED = ("sliding_window", "s_aux", "position_bias")
"""Arguments of other attention functions that change what a token sees of the prefix."""


class RemoteSession(Protocol):
    """What is needed of a session; a SyncSession has it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> ModelShape: ...
    @property
    def length(self) -> int: ...
    def append(self, k: Tensor, v: Tensor, *, start: int | None = None) -> int: ...
    def attend(self, layer: int, q: Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]: ...


class StoreCache(Cache):
    """Local keys and values behind the stored prefix [0, end) of a session; lengths and positions count both.

    A forward pass that fails because the store does not answer leaves the cache as it was, so it can be repeated.
    """

    def __init__(self, session: RemoteSession, model: PreTrainedModel, end: int | None = None) -> None:
        """`end` None is the handle's length. ValueError names what differs between the model and the session."""
        if found := differences(shape_of(model), session.shape):
            raise ValueError(f"session {session.name!r} is not for this model: {'; '.join(found)}")
        self.session = session
        self.end = session.length if end is None else end
        super().__init__(layers=[_StoreLayer(self, index) for index in range(session.shape.layers)])

    @property
    def local_tokens(self) -> int:
        """Tokens behind the prefix, kept in this process."""
        return self.get_seq_length() - self.end

    def attend(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """The store's (out, lse) of the newest T tokens, q [T, Hq, D]; if it does not answer, they are forgotten."""
        try:
            return self.session.attend(layer, q, end=self.end)
        except BaseException:
            for reached in self.layers[: layer + 1]:
                cast(_StoreLayer, reached).crop(-q.shape[0])
            raise

    def flush(self) -> int:
        """Appends the local tokens to the session, where they must be next, and attends to them there; the new end.

        AlreadyExists if another worker has appended other tokens at `end`: fork the session to go separate ways.
        """
        if tokens := self.local_tokens:
            self.session.append(*_stacked(self), start=self.end)
            self.reset()
            self.end += tokens
        return self.end


class _StoreLayer(DynamicLayer):
    def __init__(self, cache: StoreCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key_states.shape[0] != 1:
            raise ValueError(f"a batch of {key_states.shape[0]}: a StoreCache holds one sequence")
        keys, values = super().update(key_states, value_states)
        local = keys.as_subclass(_LocalKeys)
        local.layer = self
        return local, values

    def get_seq_length(self) -> int:
        return self.cache.end + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.cache.end

    def crop(self, tokens_to_remove: int) -> None:
        if -tokens_to_remove > (local := super().get_seq_length()):
            raise ValueError(f"cannot remove {-tokens_to_remove} tokens: only {local} are behind the stored prefix")
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError(f"a batch of {repeats}: a StoreCache holds one sequence")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError(f"a batch of {len(indices)}: a StoreCache holds one sequence")


class _LocalKeys(Tensor):
    """The local keys [1, H, N, D]: all that the attention sees of the cache, so they name their layer."""

    layer: _StoreLayer


def append_prefix(session: RemoteSession, past_key_values: Cache) -> int:
    """Appends all tokens of a prefilled cache to `session`; the length reached. ValueError if the shapes differ."""
    shape = session.shape
    k, v = _stacked(past_key_values)
    if (k.shape[0], *k.shape[2:]) != (shape.layers, shape.kv_heads, shape.head_dim):
        raise ValueError(
            f"session {session.name!r} takes {shape.layers} layers, {shape.kv_heads} KV heads and head_dim "
            f"{shape.head_dim}; the cache has {k.shape[0]}, {k.shape[2]} and {k.shape[3]}"
        )
    return session.append(k, v)


def _stacked(cache: Cache) -> tuple[Tensor, Tensor]:
    """K and V [layers, tokens, H, D] of a cache of one sequence."""
    layers = cast(list[DynamicLayer], cache.layers)
    pairs = [(cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in layers]
    if any(keys.shape[0] != 1 for keys, _ in pairs):
        raise ValueError(f"a batch of {pairs[0][0].shape[0]}: a session holds one sequence")
    k, v = (torch.stack([tensor[0].transpose(0, 1) for tensor in kind]) for kind in zip(*pairs, strict=True))
    return k, v


def store_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [1, Hq, T, D] over the store's prefix and the local keys: [1, T, Hq, D] in query's dtype."""
    if not isinstance(key, _LocalKeys):
        kwargs["softcap"] = softcap
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if given := [name for name in NOT_MERGED if kwargs.get(name) is not None] + ["dropout"] * bool(dropout):
        raise ValueError(f"{', '.join(given)}: not possible with a StoreCache")
    cache, shape = key.layer.cache, key.layer.cache.session.shape
    q = query[0].transpose(0, 1).float()
    states = [local_attention(q, key.as_subclass(Tensor)[0], value[0], attention_mask, shape.sm_scale, softcap or 0.0)]
    if cache.end:
        states.append(cache.attend(key.layer.index, q.contiguous()))
    out, _ = merge(states)
    return out.to(query.dtype)[None], None


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and natural-log lse [T, Hq], float32, of q [T, Hq, D] over k and v [H, N, D].

    `mask` [1, 1, T, N] is true where a row may look; None: row t is the token N - T + t and sees itself and before.
    """
    tokens, heads, width = q.shape
    grouped = q.transpose(0, 1).reshape(k.shape[0], -1, width)
    logits = (grouped @ k.float().transpose(1, 2) * sm_scale).view(heads, tokens, -1)
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if mask is None:
        mask = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).tril(k.shape[1] - tokens)[None, None]
    logits = logits.masked_fill(~mask[0], -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = weights.reshape(k.shape[0], -1, k.shape[1]) @ v.float()
    return out.view(heads, tokens, width).transpose(0, 1), lse.transpose(0, 1)


def store_mask(*, kv_offset: int = 0, local_size: int | None = None, **sizes: Any) -> Tensor | None:
    """`sdpa`'s mask over the local keys; ValueError for a padding mask that hides or leaves out stored positions."""
    padding = cast(Tensor | None, sizes.get("attention_mask"))
    if padding is not None and kv_offset and local_size is None:
        if padding.shape[-1] < (length := kv_offset + sizes["kv_length"]):
            raise ValueError(f"attention_mask has {padding.shape[-1]} positions, prefix and new tokens are {length}")
        if not padding[:, :kv_offset].all():
            raise ValueError(f"attention_mask hides some of the {kv_offset} stored positions: the prefix is read whole")
    return sdpa_mask(kv_offset=kv_offset, local_size=local_size, **sizes)


AttentionInterface.register(ATTENTION, store_attention)
AttentionMaskInterface.register(ATTENTION, store_mask)
