"""What one attention layer of a transformers model sees, handed to a function that answers in its place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "kvstore-projections"
SINK_TOKENS = 4
RECENT_TOKENS = 32
"""What stays exact when errors are weighed and measured: the first tokens of a text, and the newest."""


@dataclass(frozen=True)
class LayerCall:
    """Attention of one text: q [Hq, T, D], k and v [H, T, D], RoPE applied; `residual` [T, hidden] enters the layer.

    `output` [hidden, Hq, D] is the layer's output projection.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    residual: Tensor
    output: Tensor
    sm_scale: float

    @property
    def group(self) -> int:
        return self.q.shape[0] // self.k.shape[0]


Answer = Callable[[LayerCall], Tensor]
"""Attention output [Hq, T, D]."""


@contextmanager
def answering(model: PreTrainedModel, answer: Answer) -> Iterator[None]:
    """While entered, the model's attention over whole texts, one at a time, is what `answer` says."""
    attentions = {id(m): m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")}
    residuals: dict[int, Tensor] = {}

    def entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        residuals[cast(int, cast(nn.Module, layer.self_attn).layer_idx)] = hidden[0].float()

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any):
        layer, heads = cast(int, module.layer_idx), query.shape[1]
        weight = cast(Tensor, cast(nn.Linear, module.o_proj).weight).float()
        call = LayerCall(
            layer,
            query[0].float(),
            key[0].float(),
            value[0].float(),
            residuals[layer],
            weight.view(weight.shape[0], heads, -1),
            cast(float, kwargs["scaling"]),
        )
        return answer(call).to(query.dtype).transpose(0, 1)[None], None

    before = model.config._attn_implementation or "sdpa"
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    layers = [m for m in model.modules() if id(getattr(m, "self_attn", None)) in attentions]
    if len(layers) != model.config.get_text_config(decoder=True).num_hidden_layers:
        raise ValueError(f"{type(model).__name__} is not built of decoder layers with `self_attn` and `o_proj`")
    hooks = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def causal_weights(call: LayerCall, head: int) -> Tensor:
    """Attention weights [T, T] of one query head."""
    logits = call.q[head] @ call.k[head // call.group].T * call.sm_scale
    return torch.softmax(logits + torch.full_like(logits, -torch.inf).triu(1), dim=-1)


def stored_mask(tokens: int, device: torch.device | None = None) -> Tensor:
    """[T, T]: which tokens a query reads from a store: neither sinks nor the newest."""
    token = torch.arange(tokens, device=device)
    query = token[:, None]
    return (token >= SINK_TOKENS) & (token <= query - RECENT_TOKENS)
