"""Vectors rebuilt from what is stored."""

from torch import Tensor

from kvstore_kernels.reference.expand import rows_by_group
from kvstore_kernels.reference.score import alphas, betas, head_signs
from kvstore_kernels.shapes import tokens_of
from kvstore_kernels.types import Expansion, Rows, SignRows, Signs

BLOCK_TOKENS = 1024
"""Unpacked signs of one block and head stay in a core's cache."""


def decode(rows: Rows) -> Tensor:
    """x^ float32 [N, H, D] = mean + sum_g ( alpha_g E_g^T t_g + beta_g f_g )."""
    tokens = tokens_of(rows)
    if not isinstance(rows, SignRows):
        return rows.data.float()
    layout, signs = rows.expansion.layout, rows.signs
    out = rows.expansion.mean.expand(tokens, layout.heads, layout.head_dim).clone()
    for start in range(0, tokens, BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        _add_signs(out[block], SignRows(Signs(signs.words[block], signs.scales[block]), rows.expansion))
    return out


def _add_signs(out: Tensor, rows: SignRows) -> None:
    expansion: Expansion = rows.expansion
    for head in range(expansion.layout.heads):
        signs = head_signs(rows, head)
        for own, alpha in zip(
            rows_by_group(expansion, head), alphas(expansion, rows.signs.scales, head).T, strict=True
        ):
            out[:, head] += alpha.unsqueeze(1) * (signs[:, own] @ expansion.matrix[head][own])
        if expansion.offset_basis is not None:
            beta = betas(expansion, rows.signs.scales, head)
            out[:, head] += beta @ expansion.offset_basis[: beta.shape[1]]
