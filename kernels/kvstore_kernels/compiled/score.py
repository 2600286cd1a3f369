"""Logits of stored rows."""

import numpy as np
import torch
from torch import Tensor

from kvstore_kernels.compiled.expand import padded
from kvstore_kernels.compiled.keys import KeyReader, key_reader, rows_max
from kvstore_kernels.compiled.rows import Floats
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.shapes import heads_of, query_group, tokens_of
from kvstore_kernels.types import Rows

BLOCK_TOKENS = 1024
"""What one task reads: its logits and a head's words stay in a core's cache."""


def score(q: Tensor, keys: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0, debias: float = 0.0) -> Tensor:
    """As `reference.logits`."""
    tokens, (heads, head_dim) = tokens_of(keys), heads_of(keys)
    group = query_group(q, heads, head_dim)
    out = np.empty((len(q), heads, group, tokens), np.float32)
    step = max(1, rows_max(keys) // group)
    for start in range(0, len(q), step):
        reader = key_reader(q[start : start + step], keys, sm_scale=sm_scale, debias=debias)
        _score(reader, logit_soft_cap, out[start : start + step])
    return torch.from_numpy(out).flatten(1, 2)


def _score(reader: KeyReader, cap: float, out: Floats) -> None:
    """Fills out [T, H, Hq / H, N]."""
    queries, heads, group, tokens = out.shape

    def task(index: int) -> None:
        block = slice(index * BLOCK_TOKENS, min((index + 1) * BLOCK_TOKENS, tokens))
        logits = np.empty((heads, padded(queries * group), block.stop - block.start), np.float32)
        reader.logits(block, logits)
        soft_cap(logits, cap)
        out[..., block] = logits[:, : queries * group].reshape(heads, queries, group, -1).swapaxes(0, 1)

    run(task, -(-tokens // BLOCK_TOKENS))


def soft_cap(logits: Floats, cap: float) -> None:
    """cap * tanh(logit / cap) in place; 0 is no cap."""
    if cap:
        np.tanh(np.divide(logits, np.float32(cap), out=logits), out=logits)
        logits *= np.float32(cap)
