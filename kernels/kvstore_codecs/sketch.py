"""One layer and kind of one append: made from vectors, or checked when a client made it."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvstore_codecs.plan import KindPlan, ProjectedPlan, SignPlan
from kvstore_codecs.projected import project
from kvstore_codecs.spec import ModelShape
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import NonFiniteError, ScaleRangeError, Signs, as_torch_dtype

HALF_INFINITY_BITS = 0x7C00
"""Of a float16; larger ones are NaN, negative numbers have the sign bit."""


@dataclass(frozen=True)
class KindRows:
    """One layer and kind of an append of n tokens, of which the first `exact` stay as they are.

    `rows` [r, H, D] is in the session's dtype, with r = n for a DensePlan, else r = exact. `signs` are the other
    n - exact tokens (of a ProjectedPlan without words); None for a DensePlan.
    """

    rows: Tensor
    signs: Signs | None


def encode_kind(x: Tensor, plan: KindPlan, exact: int, backend: Backend) -> KindRows:
    """What is stored of x [n, H, D], given in the session's dtype; exact rows are views of it.

    Raises NonFiniteError or ScaleRangeError with the token counted from the start of x.
    """
    if plan.widths is None:
        _check_finite(x)
        return KindRows(x, None)
    rows, others = x[:exact], x[exact:]
    _check_finite(rows)
    try:
        signs = project(others, plan) if isinstance(plan, ProjectedPlan) else backend.encode(others, plan.encoder)
        return KindRows(rows, signs)
    except (NonFiniteError, ScaleRangeError) as error:
        raise type(error)(error.token + exact, error.head) from None


def check_kind(kind_rows: KindRows, plan: KindPlan, shape: ModelShape, tokens: int, exact: int) -> None:
    """ValueError, saying what, unless a sketch made elsewhere is one that this plan could have made.

    Every row count is a multiple of 32, so words have no padding bits; every pattern of them is a valid sketch.
    """
    rows, signs = kind_rows.rows, kind_rows.signs
    kept = tokens if plan.widths is None else exact
    _check_tensor("rows", rows, (kept, shape.kv_heads, shape.head_dim), as_torch_dtype(shape.dtype))
    _check_finite(rows)
    if plan.widths is None:
        if signs is not None:
            raise ValueError("signs: this layer and kind are kept as rows")
        return
    if signs is None:
        raise ValueError("signs: this layer and kind are kept as signs")
    _check_tensor("words", signs.words, (tokens - exact, plan.widths.words), torch.int32)
    _check_tensor("scales", signs.scales, (tokens - exact, plan.widths.scales), torch.float16)
    if not _positive_and_finite(signs.scales):
        if not signs.scales.isfinite().all():
            raise ValueError("scales: NaN or Inf")
        if isinstance(plan, SignPlan) and (signs.scales[:, _alphas(plan)] < 0).any():
            raise ValueError("scales: a negative alpha")


def _positive_and_finite(halves: Tensor) -> bool:
    """Of float16, by its bits as integers: one pass over them."""
    if not halves.numel():
        return True
    least, most = halves.view(torch.int16).aminmax()
    return int(least) >= 0 and int(most) < HALF_INFINITY_BITS


def _alphas(plan: SignPlan) -> Tensor:
    """Which of a token's scales are alphas; the others are offsets."""
    starts = [start for start, end in pairwise(plan.layout.scale_starts) if end > start]
    return torch.tensor([start + group for start in starts for group in range(plan.layout.groups)], dtype=torch.int64)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    empty = tensor.numel() == 0 and 0 in shape and tensor.shape[0] == shape[0]
    if tensor.dtype != dtype or not (empty or tensor.shape == shape):
        raise ValueError(f"{name}: {tensor.dtype} {[*tensor.shape]} instead of {dtype} {[*shape]}")


def _check_finite(x: Tensor) -> None:
    if not x.numel() or all(bool(each.isfinite()) for each in x.aminmax()):  # NaN goes through a minimum
        return
    bad = (~x.isfinite().all(dim=-1)).nonzero()
    if len(bad):
        raise NonFiniteError(int(bad[0, 0]), int(bad[0, 1]))
