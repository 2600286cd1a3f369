"""Attention over stored rows: blocks of tokens give partial softmax sums, which are merged in the order of tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.expand import QUAD, padded
from kvstore_kernels.compiled.jit import reassociating
from kvstore_kernels.compiled.keys import KeyReader, key_reader, rows_max
from kvstore_kernels.compiled.rows import Floats
from kvstore_kernels.compiled.score import BLOCK_TOKENS, soft_cap
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.compiled.values import Doubles, ValueReader, value_reader
from kvstore_kernels.shapes import check_pair, heads_of, query_group, tokens_of
from kvstore_kernels.types import Rows

WAVE_BLOCKS = 64
"""Blocks whose partial sums are kept before they are merged."""

LOWEST = np.finfo(np.float32).min
"""In place of -inf, which a block of hidden tokens has for its best logit."""

WAVE_BYTES_MAX = 1 << 26
WAVE_ROWS_MAX = 32
"""Query rows of a KV head in one pass: its logits of a block stay in a core's cache."""


@dataclass(frozen=True)
class _Partial:
    """Softmax sums of some tokens relative to their best logit, with any leading dimensions before [H, R]."""

    best: Floats
    total: Doubles
    sums: Doubles

    def merged(self) -> "_Partial":
        """The leading dimension summed away, in its order."""
        best = self.best.max(0)
        scale = np.exp((self.best - best).astype(np.float64))
        return _Partial(best, (self.total * scale).sum(0), (self.sums * scale[..., None]).sum(0))

    def followed_by(self, count: int) -> "_Partial":
        """This and `count` empty ones."""
        return _Partial(_with_zeros(self.best, count), _with_zeros(self.total, count), _with_zeros(self.sums, count))


def attend(
    q: Tensor, keys: Rows, values: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0, debias: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `reference.attend`."""
    check_pair(keys, values)

    def reader(part: slice) -> KeyReader:
        return key_reader(q[part], keys, sm_scale=sm_scale, debias=debias)

    group = query_group(q, *heads_of(keys))
    return _attend(reader, values, (len(q), group), rows_max(keys), logit_soft_cap)


def weigh(logits: Tensor, values: Rows) -> tuple[Tensor, Tensor]:
    """As `reference.weigh`."""
    by_head = logits.unflatten(1, (heads_of(values)[0], -1)).transpose(0, 1).numpy()
    return _attend(lambda part: _Given(by_head[:, part]), values, (len(logits), by_head.shape[2]), WAVE_ROWS_MAX, 0.0)


@dataclass(frozen=True)
class _Given:
    """A KeyReader of logits [H, T, Hq / H, N] that are there already."""

    known: Floats

    def logits(self, tokens: slice, out: Floats) -> None:
        rows = self.known[..., tokens]
        out[:] = 0
        out[:, : rows.shape[1] * rows.shape[2]] = rows.reshape(len(rows), -1, rows.shape[3])


def _attend(
    reader: Callable[[slice], KeyReader], values: Rows, queries: tuple[int, int], rows_most: int, cap: float
) -> tuple[Tensor, Tensor]:
    """Of (T, Hq / H) queries, whose keys `reader` gives for some of the T."""
    (count, group), (heads, head_dim), tokens = queries, heads_of(values), tokens_of(values)
    out, lse = torch.zeros(count, heads, group, head_dim), torch.full((count, heads, group), -torch.inf)
    sums = value_reader(values)
    wave = 8 * (WAVE_BLOCKS + 1) * heads * sums.width
    step = max(1, min(WAVE_ROWS_MAX, rows_most, max(QUAD, WAVE_BYTES_MAX // wave)) // group)
    for start in range(0, count if tokens else 0, step):
        part = slice(start, min(start + step, count))
        rows = (part.stop - start) * group
        state = _reduce(reader(part), sums, tokens, (heads, padded(rows)), cap)
        for head in range(heads):
            total = state.total[head, :rows]
            seen = np.where(total > 0, total, 1.0)
            mean = sums.combine(head, state.sums[head, :rows], total) / seen[:, None]
            known = np.where(total > 0, state.best[head, :rows] + np.log(seen), -np.inf)
            out[part, head] = torch.from_numpy(mean).float().unflatten(0, (-1, group))
            lse[part, head] = torch.from_numpy(known).float().unflatten(0, (-1, group))
    return out.flatten(1, 2), lse.flatten(1, 2)


def _reduce(keys: KeyReader, values: ValueReader, tokens: int, rows: tuple[int, int], cap: float) -> _Partial:
    """The sums of all tokens, for (H, R) query rows."""
    blocks = -(-tokens // BLOCK_TOKENS)
    state = _Partial(np.full(rows, -np.inf, np.float32), np.zeros(rows), np.zeros((*rows, values.width)))
    for first in range(0, blocks, WAVE_BLOCKS):
        count = min(WAVE_BLOCKS, blocks - first)
        wave = state.followed_by(count)

        def task(index: int, first: int = first, wave: _Partial = wave) -> None:
            start = (first + index) * BLOCK_TOKENS
            block = slice(start, min(start + BLOCK_TOKENS, tokens))
            weights = np.empty((*rows, block.stop - start), np.float32)
            keys.logits(block, weights)
            soft_cap(weights, cap)
            best = wave.best[index + 1] = np.maximum(weights.max(2), LOWEST)
            np.exp(np.subtract(weights, best[..., None], out=weights), out=weights)
            _row_sums(weights, wave.total[index + 1])
            values.add(block, weights, wave.sums[index + 1])

        run(task, count)
        state = wave.merged()
    return state


def _with_zeros(x: NDArray, count: int) -> NDArray:
    return np.concatenate([x[None], np.zeros((count, *x.shape), x.dtype)])


@reassociating
def _row_sums(weights, sums):
    for head in range(weights.shape[0]):
        for row in range(weights.shape[1]):
            total = 0.0
            for token in range(weights.shape[2]):
                total += np.float64(weights[head, row, token])
            sums[head, row] = total
