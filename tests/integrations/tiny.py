"""A tiny Llama and a session in this process, for tests of the integration."""

from typing import Any

import torch
import transformers
from torch import Tensor

from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.integrations.transformers import ATTENTION, append_prefix
from kvstore_codecs.spec import ModelShape

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


def assert_same(remote: Tensor, local: Tensor) -> None:
    """Logits that differ by no more than float32 rounding of their size."""
    torch.testing.assert_close(remote, local, atol=1e-5 * float(local.abs().max()), rtol=0)
