"""Random rows, expansions and encoders of every shape, and float64 readings of them written apart from the ops."""

import torch
from torch import Tensor

from kvstore_kernels.reference import expand
from kvstore_kernels.types import (
    DenseRows,
    Expansion,
    HeadEncoder,
    Rows,
    SignEncoder,
    SignLayout,
    SignRows,
    Signs,
    plane_weights,
)

SIZES = (0, 1, 255, 256, 257, 1025)
"""Token counts around the borders of every block."""


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """torch.testing's has to import torch.distributed first, which takes longer than all of these tests."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    worst = float((error - rtol * expected.double().abs()).max()) if error.numel() else 0.0
    assert worst <= atol, f"beyond rtol {rtol} by {worst}, over {atol}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def expansion(
    words: tuple[int, ...] = (4, 4),
    head_dim: int = 64,
    groups: int = 1,
    *,
    offsets: bool = False,
    read: tuple[int, ...] | None = None,
    query_bits: int = 12,
) -> Expansion:
    """Heads of `words` words, dealt to the groups in turn, of which `read` are read."""
    layout = SignLayout(head_dim, groups, tuple(tuple(w % groups for w in range(count)) for count in words), offsets)
    rows = [32 * count for count in (words if read is None else read)]
    return Expansion(
        layout=layout,
        matrix=tuple(normal(m, head_dim, seed=h) for h, m in enumerate(rows)),
        noise=tuple(uniform(m, seed=h) for h, m in enumerate(rows)),
        mean=normal(len(words), head_dim, seed=1),
        query_bits=query_bits,
        offset_basis=normal(groups, head_dim, seed=2) if offsets else None,
    )


def sign_rows(tokens: int, by: Expansion, seed: int = 0) -> SignRows:
    layout = by.layout
    words = (uniform(tokens, layout.words, seed=seed) * 2**32 - 2**31).to(torch.int64).to(torch.int32)
    scales = 0.005 + 0.01 * uniform(tokens, layout.scales, seed=seed + 1)
    return SignRows(Signs(words, scales.half()), by)


def dense_rows(tokens: int, heads: int = 2, head_dim: int = 64, seed: int = 0) -> DenseRows:
    return DenseRows(normal(tokens, heads, head_dim, seed=seed))


def any_rows(kind: str, tokens: int, seed: int = 0) -> Rows:
    """`sign` or `dense` rows of 2 heads of 64 channels."""
    return sign_rows(tokens, expansion(), seed) if kind == "sign" else dense_rows(tokens, seed=seed)


def part(rows: Rows, start: int, end: int) -> Rows:
    if isinstance(rows, DenseRows):
        return DenseRows(rows.data[start:end])
    return SignRows(Signs(rows.signs.words[start:end], rows.signs.scales[start:end]), rows.expansion)


def strided(x: Tensor) -> Tensor:
    """x with every stride doubled."""
    wide = torch.stack([x, torch.zeros_like(x)], -1).repeat_interleave(2, 0)
    return wide[::2, ..., 0]


def sign_encoder(
    head_dim: int = 64,
    planes: int = 1,
    heads: int = 2,
    *,
    rows: int | None = None,
    norm_factor: tuple[float, ...] | None = None,
    coded_energy: bool = False,
) -> SignEncoder:
    """A rotation of `rows` directions (default head_dim) with additive planes, the same for all heads."""
    blocks = [torch.linalg.qr(normal(head_dim, head_dim, seed=s)).Q for s in range(-(-(rows or head_dim) // head_dim))]
    projection = torch.cat(blocks)[: rows or head_dim]
    count = len(projection)
    head = HeadEncoder(
        projection=projection,
        depth=torch.full((count,), planes, dtype=torch.int32),
        sigma=0.5 + uniform(count),
        row_coordinate=torch.arange(count, dtype=torch.int32).repeat(planes),
        row_shift=torch.arange(planes - 1, -1, -1, dtype=torch.int32).repeat_interleave(count),
        row_weight=torch.tensor(plane_weights(planes)).repeat_interleave(count),
    )
    layout = SignLayout(head_dim, 1, ((0,) * (planes * count // 32),) * heads)
    mean = normal(heads, head_dim, seed=3)
    return SignEncoder(layout, (head,) * heads, mean, torch.ones(1, head_dim), norm_factor, coded_energy)


def signs64(words: Tensor) -> Tensor:
    """t float64 [N, 32 W] of words [N, W]."""
    return 2.0 * (words.long().unsqueeze(-1) >> torch.arange(32) & 1).flatten(1).double() - 1


def head_parts(rows: SignRows, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t [N, m], the alpha of each row [N, m], all alphas [N, G] and betas [N, G] of one head, float64."""
    by, layout = rows.expansion, rows.expansion.layout
    start, count = layout.word_starts[head], len(by.matrix[head]) // 32
    first, last = layout.scale_starts[head : head + 2]
    scales = rows.signs.scales[:, first:last].double()
    alphas, betas = scales[:, : layout.groups], scales[:, layout.groups :]
    groups = torch.tensor(layout.word_groups[head][:count], dtype=torch.int64).repeat_interleave(32)
    return signs64(rows.signs.words[:, start : start + count]), alphas[:, groups], alphas, betas


def vectors(rows: Rows) -> Tensor:
    """x^ float64 [N, H, D]."""
    if isinstance(rows, DenseRows):
        return rows.data.double()
    out = []
    for head, matrix in enumerate(rows.expansion.matrix):
        t, alpha, _, betas = head_parts(rows, head)
        x = rows.expansion.mean[head].double() + (alpha * t) @ matrix.double()
        if rows.expansion.offset_basis is not None:
            x = x + betas @ rows.expansion.offset_basis[: betas.shape[1]].double()
        out.append(x)
    return torch.stack(out, 1)


def logits64(q: Tensor, keys: Rows, sm_scale: float, cap: float = 0.0, debias: float = 0.0) -> Tensor:
    """[T, Hq, N] float64, of the integer query where keys are signs."""
    heads = keys.data.shape[1] if isinstance(keys, DenseRows) else keys.expansion.layout.heads
    rows = q.double().unflatten(1, (heads, -1))
    out = []
    for head in range(heads):
        if isinstance(keys, DenseRows):
            scores = torch.einsum("tgd,nd->tgn", rows[:, head], keys.data[:, head].double()) * sm_scale
        else:
            own, (t, alpha, alphas, betas) = expand(q, keys.expansion)[head], head_parts(keys, head)
            y = own.ints.double() * own.step.double().unsqueeze(1)
            scores = own.mean.double().unsqueeze(1) + y @ (alpha * t).T + own.offsets.double() @ betas.T
            variance = own.noise[:, : alphas.shape[1]].double() @ alphas.square().T
            scores = (scores * sm_scale - debias / 2 * sm_scale**2 * variance).unflatten(0, (len(q), -1))
        out.append(cap * torch.tanh(scores / cap) if cap else scores)
    return torch.cat(out, 1)


def attention64(logits: Tensor, values: Rows) -> tuple[Tensor, Tensor]:
    """Out and lse float64."""
    x = vectors(values)
    weights = torch.softmax(logits, 2).unflatten(1, (x.shape[1], -1))
    return torch.einsum("thgn,nhd->thgd", weights, x).flatten(1, 2), logits.logsumexp(2)
