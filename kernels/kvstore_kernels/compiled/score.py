"""Logits of query rows, four at a time: a byte of a sketch is one look-up of eight rows of E q for all four.

Integer scores of two query rows share an int64, the second in the upper half: sums of such pairs are pairs of sums.
Measured on two cores of a Xeon (AVX-512), 32,768 tokens x 8 heads x 256 bits, 4 query rows a head, one thread: sums
over table entries of int16 or int32 20-30 ms; word by word, with the table of one word in the first-level cache and
packed pairs, 6 ms.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel, reassociating
from kvstore_kernels.compiled.rows import DenseBlocks, Floats, SignBlocks
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.reference.expand import HeadQueries, expand
from kvstore_kernels.shapes import heads_of, query_group, tokens_of
from kvstore_kernels.types import WORD_ROWS, DenseRows, Rows, SignRows

BLOCK_TOKENS = 1024
"""What one task reads: its logits and a head's words stay in a core's cache."""

QUAD = 4
"""Query rows of a KV head that one pass over the sketches serves."""


DENSE_TOKENS = 128
"""Dense rows that are widened to float32 at once."""


class KeyReader(Protocol):
    """Keys as seen by the R query rows of each KV head, row t * (Hq / H) + g, R padded to a multiple of QUAD."""

    def logits(self, tokens: slice, out: Floats) -> None:
        """Fills out [H, R, n], before any soft cap."""
        ...


def score(q: Tensor, keys: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
    """As `reference.score`."""
    tokens, (heads, head_dim) = tokens_of(keys), heads_of(keys)
    group = query_group(q, heads, head_dim)
    reader = key_reader(q, keys, sm_scale=sm_scale)
    out = np.empty((len(q), heads, group, tokens), np.float32)

    def task(index: int) -> None:
        block = slice(index * BLOCK_TOKENS, min((index + 1) * BLOCK_TOKENS, tokens))
        logits = np.empty((heads, padded(len(q) * group), block.stop - block.start), np.float32)
        reader.logits(block, logits)
        soft_cap(logits, logit_soft_cap)
        out[..., block] = logits[:, : len(q) * group].reshape(heads, len(q), group, -1).swapaxes(0, 1)

    run(task, -(-tokens // BLOCK_TOKENS))
    return torch.from_numpy(out).flatten(1, 2)


def key_reader(q: Tensor, keys: Rows, *, sm_scale: float, debias: float = 0.0) -> KeyReader:
    if isinstance(keys, SignRows):
        return _SignKeys(q, keys, sm_scale, debias)
    return _DenseKeys(q, keys, sm_scale)


def soft_cap(logits: Floats, cap: float) -> None:
    """cap * tanh(logit / cap) in place; 0 is no cap."""
    if cap:
        np.tanh(np.divide(logits, np.float32(cap), out=logits), out=logits)
        logits *= np.float32(cap)


def padded(rows: int) -> int:
    return -(-rows // QUAD) * QUAD


class _SignKeys:
    def __init__(self, q: Tensor, keys: SignRows, sm_scale: float, debias: float) -> None:
        self._blocks = SignBlocks(keys)
        self._heads = [
            _SignHead(queries, keys.expansion.layout.word_groups[head], keys.expansion.layout.groups)
            for head, queries in enumerate(expand(q, keys.expansion))
        ]
        self._sm_scale, self._penalty = np.float32(sm_scale), np.float32(debias / 2 * sm_scale**2)

    def logits(self, tokens: slice, out: Floats) -> None:
        for head, own in enumerate(self._heads):
            alphas, betas = self._blocks.scales(tokens, head)
            out[head] = own.mean
            _add_signs(self._blocks.words(tokens, head), own.order, own.ends, own.tables, alphas, own.step, out[head])
            _finish(alphas, betas, own.offsets, own.noise, self._sm_scale, self._penalty, out[head])


class _SignHead:
    """The expanded queries of one head, padded with rows of zeros, as `_add_signs` and `_finish` read them."""

    def __init__(self, queries: HeadQueries, word_groups: tuple[int, ...], groups: int) -> None:
        rows, m = queries.ints.shape
        own = np.array(word_groups[: m // WORD_ROWS], np.int64)
        self.order = np.argsort(own, kind="stable")
        self.ends = np.searchsorted(own[self.order], np.arange(groups), side="right")
        ints = np.zeros((padded(rows), m), np.int64)
        ints[:rows] = queries.ints.numpy()
        ints = ints.reshape(-1, QUAD // 2, 2, m // WORD_ROWS, WORD_ROWS)[:, :, :, self.order]
        pairs = ((ints[:, :, 1] << 32) + ints[:, :, 0]).reshape(-1, QUAD // 2, m)
        self.tables = np.empty((len(pairs), m // 8, 256, QUAD // 2), np.int64)
        _byte_tables(pairs, self.tables)
        self.step, self.mean, self.offsets, self.noise = (
            _pad(part.numpy()) for part in (queries.step, queries.mean.unsqueeze(1), queries.offsets, queries.noise)
        )


class _DenseKeys:
    def __init__(self, q: Tensor, keys: DenseRows, sm_scale: float) -> None:
        rows = q.float().unflatten(1, (keys.data.shape[1], -1)).transpose(0, 1).flatten(1, 2)
        self._queries = np.stack([_pad(own.numpy()) for own in rows])
        self._blocks, self._sm_scale = DenseBlocks(keys.data), np.float32(sm_scale)

    def logits(self, tokens: slice, out: Floats) -> None:
        for start in range(0, out.shape[2], DENSE_TOKENS):
            part = slice(tokens.start + start, min(tokens.start + start + DENSE_TOKENS, tokens.stop))
            _dense_scores(
                self._blocks.read(part), self._queries, self._sm_scale, out[:, :, start : start + DENSE_TOKENS]
            )


def _pad(rows: Floats) -> Floats:
    out = np.zeros((padded(len(rows)), *rows.shape[1:]), np.float32)
    out[: len(rows)] = rows
    return out


@kernel
def _byte_tables(pairs: NDArray[np.int64], tables: NDArray[np.int64]) -> None:
    """tables[quad, b, v] = sum_j t_j pairs[quad, :, 8 b + j] with t_j of bit j of v; each from v without its last 1."""
    for quad in range(tables.shape[0]):
        for byte in range(tables.shape[1]):
            for pair in range(tables.shape[3]):
                total = np.int64(0)
                for j in range(8):
                    total -= pairs[quad, pair, 8 * byte + j]
                tables[quad, byte, 0, pair] = total
            for value in range(1, 256):
                last = 0
                while not (value >> last) & 1:
                    last += 1
                for pair in range(tables.shape[3]):
                    more = 2 * pairs[quad, pair, 8 * byte + last]
                    tables[quad, byte, value, pair] = tables[quad, byte, value & (value - 1), pair] + more


@kernel
def _add_signs(words, order, ends, tables, alphas, step, out):
    """out[r, n] += sum_g (alphas[g, n] step[r]) <ints_rg, t_ng>; `order` lists words by group, which end at `ends`."""
    count = words.shape[0]
    lines = np.empty((order.shape[0], count), np.uint32)
    for token in range(count):
        for word in range(order.shape[0]):
            lines[word, token] = np.uint32(words[token, order[word]])
    sums = np.empty((count, 2), np.int64)
    for quad in range(tables.shape[0]):
        first = 0
        for group in range(alphas.shape[0]):
            sums[:] = 0
            for word in range(first, ends[group]):
                table, line = tables[quad, 4 * word : 4 * word + 4], lines[word]
                for token in range(count):
                    bits = line[token]
                    low, high = sums[token, 0], sums[token, 1]
                    for byte in range(4):
                        value = (bits >> np.uint32(8 * byte)) & np.uint32(255)
                        low += table[byte, value, 0]
                        high += table[byte, value, 1]
                    sums[token, 0], sums[token, 1] = low, high
            first = ends[group]
            for pair in range(2):
                row = 4 * quad + 2 * pair
                for token in range(count):
                    even = np.int32(sums[token, pair])
                    odd = np.int32((sums[token, pair] - even) >> 32)
                    out[row, token] += (alphas[group, token] * step[row]) * np.float32(even)
                    out[row + 1, token] += (alphas[group, token] * step[row + 1]) * np.float32(odd)


@kernel
def _finish(alphas, betas, offsets, noise, sm_scale, penalty, out):
    """out = sm_scale (out + sum_g betas_g offsets_g) - penalty sum_g alphas_g^2 noise_g."""
    for row in range(out.shape[0]):
        for group in range(betas.shape[0]):
            for token in range(out.shape[1]):
                out[row, token] += betas[group, token] * offsets[row, group]
        for token in range(out.shape[1]):
            out[row, token] *= sm_scale
        if penalty != 0:
            for group in range(alphas.shape[0]):
                for token in range(out.shape[1]):
                    out[row, token] -= penalty * (alphas[group, token] * alphas[group, token] * noise[row, group])


@reassociating
def _dense_scores(rows, queries, sm_scale, out):
    """out[h, r, n] = sm_scale <queries_hr, rows_nh>, in the order in which the rows lie in memory."""
    for token in range(rows.shape[0]):
        for head in range(rows.shape[1]):
            key = rows[token, head]
            for row in range(0, queries.shape[1], 4):
                query0, query1 = queries[head, row], queries[head, row + 1]
                query2, query3 = queries[head, row + 2], queries[head, row + 3]
                dot0 = dot1 = dot2 = dot3 = np.float32(0)
                for channel in range(key.shape[0]):
                    dot0 += query0[channel] * key[channel]
                    dot1 += query1[channel] * key[channel]
                    dot2 += query2[channel] * key[channel]
                    dot3 += query3[channel] * key[channel]
                out[head, row, token], out[head, row + 1, token] = dot0 * sm_scale, dot1 * sm_scale
                out[head, row + 2, token], out[head, row + 3, token] = dot2 * sm_scale, dot3 * sm_scale
