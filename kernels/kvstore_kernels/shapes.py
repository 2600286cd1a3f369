"""What the arguments of an op must be to one another; ValueError names what is not."""

from torch import Tensor

from kvstore_kernels.types import Rows, SignRows


def tokens_of(rows: Rows) -> int:
    """N, after a check that the parts of `rows` fit its layout."""
    if not isinstance(rows, SignRows):
        if rows.data.dim() != 3:
            raise ValueError(f"dense rows have shape {[*rows.data.shape]} instead of [N, H, D]")
        return rows.data.shape[0]
    layout, tokens = rows.expansion.layout, rows.signs.words.shape[0]
    for name, width in (("words", layout.words), ("scales", layout.scales)):
        shape = [*getattr(rows.signs, name).shape]
        if shape != [tokens, width]:
            raise ValueError(f"{name} have shape {shape} instead of {[tokens, width]}")
    return tokens


def heads_of(rows: Rows) -> tuple[int, int]:
    """(H, D)."""
    if isinstance(rows, SignRows):
        return rows.expansion.layout.heads, rows.expansion.layout.head_dim
    return rows.data.shape[1], rows.data.shape[2]


def query_group(q: Tensor, heads: int, head_dim: int) -> int:
    """Query heads a KV head, of q [T, Hq, D]."""
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(f"q has shape {[*q.shape]} instead of [T, a multiple of {heads} query heads, {head_dim}]")
    return q.shape[1] // heads


def check_pair(keys: Rows, values: Rows) -> int:
    """N of keys and values of the same tokens, heads and head_dim."""
    tokens = tokens_of(keys)
    if tokens_of(values) != tokens or heads_of(values) != heads_of(keys):
        raise ValueError(
            f"keys of {tokens} tokens, (heads, head_dim) {heads_of(keys)} "
            f"with values of {tokens_of(values)} tokens, {heads_of(values)}"
        )
    return tokens
