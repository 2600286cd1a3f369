"""Next tokens through the store against next tokens with the whole exact cache in the process, teacher-forced."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.demo.messages import Agreement
from kvstore_client.integrations.transformers import RemoteSession, StoreCache

DECISIVE_GAP = 1e-3
"""Logits closer than this may swap places by float32 rounding alone."""
PREFILL_TOKENS = 256
BLOCK_TOKENS = 64
"""Positions of one forward pass: a row sees at most so many tokens locally, all earlier ones in the store."""


def prefill(
    model: PreTrainedModel, ids: Tensor, keep: int, progress: Callable[[int], None]
) -> tuple[DynamicCache, Tensor]:
    """The cache of ids [1, N] and the logits [keep, vocabulary] of its last `keep` positions."""
    cache = DynamicCache(config=model.config)
    for chunk in ids[:, :-keep].split(PREFILL_TOKENS, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
        progress(cache.get_seq_length())
    logits = model(ids[:, -keep:], past_key_values=cache).logits[0]
    progress(cache.get_seq_length())
    return cache, logits


def through_store(
    model: PreTrainedModel, session: RemoteSession, ids: Tensor, count: int, progress: Callable[[int], None]
) -> Tensor:
    """Logits [count, vocabulary] of the last `count` positions of ids [1, N], which the session holds."""
    first = ids.shape[1] - count
    found: list[Tensor] = []
    for start in range(first, ids.shape[1], BLOCK_TOKENS):
        cache = StoreCache(session, model, end=start)
        found.append(model(ids[:, start : start + BLOCK_TOKENS], past_key_values=cache).logits[0])
        progress(start + found[-1].shape[0] - first)
    return torch.cat(found)


def agreement(exact: Tensor, stored: Tensor) -> Agreement:
    """Of two logits [positions, vocabulary]."""
    best = exact.topk(2, dim=-1)
    same = stored.argmax(dim=-1) == best.indices[:, 0]
    decisive = best.values[:, 0] - best.values[:, 1] > DECISIVE_GAP
    expected = exact.double().log_softmax(-1)
    divergence = expected.exp() * (expected - stored.double().log_softmax(-1))
    return Agreement(
        positions=len(exact),
        agreeing=int(same.sum()),
        decisive=int(decisive.sum()),
        decisive_agreeing=int((same & decisive).sum()),
        kl=float(divergence.sum(-1).mean()),
    )
