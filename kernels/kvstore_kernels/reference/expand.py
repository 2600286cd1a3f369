"""The query side of every sign codec: E q as integers, so that all devices score with the same numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore_kernels.shapes import query_group
from kvstore_kernels.types import WORD_ROWS, Expansion

SMALLEST_STEP = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class HeadQueries:
    """The R = T * Hq / H query rows that read one KV head, token-major: row t * (Hq / H) + g.

    A sign row scores mean + sum_g alpha_g step <ints_g, t_g> + sum_g beta_g offsets_g; its variance is
    sum_g alpha_g^2 noise_g.
    """

    ints: Tensor  # [R, m] float32, whole numbers
    step: Tensor  # [R] float32
    mean: Tensor  # [R] float32, <q, mean>
    offsets: Tensor  # [R, G] float32, <q, f_g>; no columns where the head stores no offsets
    noise: Tensor  # [R, G] float32, N_g(q)


def expand(q: Tensor, expansion: Expansion) -> list[HeadQueries]:
    """The expanded queries of every KV head, of q [T, Hq, D]."""
    layout = expansion.layout
    by_head = q.unflatten(1, (layout.heads, query_group(q, layout.heads, layout.head_dim))).unbind(1)
    return [_expand_head(rows, expansion, head) for head, rows in enumerate(by_head)]


def rows_by_group(expansion: Expansion, head: int) -> list[slice | Tensor]:
    """For each scale group, which of the head's rows that this expansion reads are its own; [] if it stores none."""
    layout = expansion.layout
    if not layout.word_groups[head]:
        return []
    if layout.groups == 1:
        return [slice(None)]
    of_row = torch.tensor(layout.word_groups[head][: expansion.read_words(head)]).repeat_interleave(WORD_ROWS)
    return [(of_row == group).nonzero().flatten() for group in range(layout.groups)]


def _expand_head(q: Tensor, expansion: Expansion, head: int) -> HeadQueries:
    """q [T, g, D]."""
    y = _project(q, expansion.matrix[head])
    step = torch.zeros(len(y)) if y.shape[1] == 0 else y.abs().amax(1) / (2 ** (expansion.query_bits - 1) - 1)
    # GPUs flush what is below float32's normal range to zero: such a query counts as zero everywhere.
    usable = step >= SMALLEST_STEP
    ints = torch.round(y / torch.where(usable, step, 1.0).unsqueeze(1)) * usable.unsqueeze(1)
    squares = expansion.noise[head].double() * y.double().square()
    noise = torch.zeros(len(y), expansion.layout.groups)
    for column, rows in zip(noise.T, rows_by_group(expansion, head), strict=False):
        column.copy_(squares[:, rows].sum(1))
    basis = torch.zeros(0, q.shape[2])
    if expansion.offset_basis is not None and expansion.layout.word_groups[head]:
        basis = expansion.offset_basis
    return HeadQueries(
        ints=ints,
        step=step * usable,
        mean=_project(q, expansion.mean[head : head + 1]).squeeze(1),
        offsets=_project(q, basis),
        noise=noise,
    )


def _project(q: Tensor, matrix: Tensor) -> Tensor:
    """<matrix_i, q_r> float32 [T * g, m] of q [T, g, D] and matrix [m, D].

    In float64, by one product of the same shape a query token: after rounding neither the batch around a query nor the
    order of a sum shows.
    """
    out = torch.empty(q.shape[0], q.shape[1], matrix.shape[0])
    for token, rows in zip(out, q.double(), strict=True):
        token.copy_(rows @ matrix.double().T)
    return out.flatten(0, 1)
