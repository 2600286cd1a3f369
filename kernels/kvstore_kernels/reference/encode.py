"""Vectors to packed signs and scales."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvstore_kernels.packing import pack_rows
from kvstore_kernels.types import (
    STEP,
    WORD_ROWS,
    AffineEncoder,
    Encoder,
    HeadEncoder,
    NonFiniteError,
    ScaleRangeError,
    SignEncoder,
    Signs,
)

FP16_MAX = 65504.0
BLOCK_ROWS = 2048
"""Vectors encoded at once: their float64 coordinates stay in a core's cache."""


def encode(x: Tensor, encoder: Encoder) -> Signs:
    """Sketches of x [N, H, D], any float dtype; raises NonFiniteError or ScaleRangeError.

    A vector's bits and scales depend on nothing but it and the encoder. After the mean is subtracted in float32 all is
    float64: then an order of summation that changes with the batch moves a result by 1e-16 of itself, too little to
    carry a coordinate over a threshold or a scale over a rounding of fp16. Blocks padded to a fixed size, the other
    way to that, cost a one-token append as much as a full block.
    """
    layout = encoder.layout
    check_shape(x, encoder)
    check_finite(x)
    words = torch.empty(len(x), layout.words, dtype=torch.int32, device=x.device)
    scales = torch.empty(len(x), layout.scales, dtype=torch.float64, device=x.device)
    for heads in _alike(encoder):
        word_columns = _columns(layout.word_starts, heads)
        scale_columns = _columns(layout.scale_starts, heads)
        step = max(1, BLOCK_ROWS // len(heads))
        for start in range(0, len(x), step):
            block = slice(start, start + step)
            rows = x[block, heads].float() - encoder.mean[heads]
            bits, numbers = _encode_heads(rows.flatten(0, 1), encoder, heads[0])
            words[block, word_columns] = pack_rows(bits).view(len(rows), -1)
            scales[block, scale_columns] = numbers.view(len(rows), -1)
    check_range(scales, encoder)
    return Signs(words, scales.half())


def _alike(encoder: Encoder) -> Iterator[list[int]]:
    """Heads that store words, those with the same encoder together."""
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for head, groups in enumerate(encoder.layout.word_groups):
        if groups:
            code = id(encoder.heads[head]) if isinstance(encoder, SignEncoder) else 0
            alike.setdefault((code, groups), []).append(head)
    yield from alike.values()


def _columns(starts: tuple[int, ...], heads: list[int]) -> Tensor:
    return torch.cat([torch.arange(starts[head], starts[head + 1]) for head in heads])


def _encode_heads(x: Tensor, encoder: Encoder, head: int) -> tuple[Tensor, Tensor]:
    """Bits [R, m] and scales float64 [R, S] of centred vectors x [R, D] of heads whose encoder is that of `head`."""
    if isinstance(encoder, AffineEncoder):
        return _affine(x.double(), encoder.planes)
    return _signs(x.double(), encoder, head)


def _signs(x: Tensor, encoder: SignEncoder, head: int) -> tuple[Tensor, Tensor]:
    code = encoder.heads[head]
    z = x @ code.projection.double().T
    index = _indices(z, code)
    bits = index[:, code.row_coordinate.long()] >> code.row_shift.to(torch.uint8) & 1
    squares = x.square()
    alphas = []
    for group in range(encoder.layout.groups):
        energy = squares @ encoder.support[group].double()
        if encoder.norm_factor is not None:
            alphas.append(encoder.norm_factor[group] * energy.sqrt())
            continue
        levels, coded = group_levels(code, encoder.layout.word_groups[head], group)
        if encoder.coded_energy:
            energy = (z * coded).square().sum(1)
        along = (z * levels.gather(0, index.long())).sum(1)
        alphas.append(torch.where(along > 0, energy / along, 0.0))
    return bits, torch.stack(alphas, 1)


def _indices(z: Tensor, code: HeadEncoder) -> Tensor:
    """uint8 [R, C]: the cell of each coordinate; a vector of zeros lies in the cells that begin at 0."""
    positive = z > 0
    if int(code.depth.max()) <= 1:
        return positive.to(torch.uint8)
    sigma, coded = code.sigma.double(), code.depth > 0
    gain = (z / sigma)[:, coded].square().mean(1, keepdim=True).sqrt()
    half = torch.where(coded, 2.0 ** (code.depth - 1), 0.0)
    cell = torch.floor(z / (step_widths(code) * torch.where(gain > 0, gain, 1.0))) + half
    cell = torch.minimum(cell, 2 * half - 1).clamp_(min=0)
    return torch.where(code.depth == 1, positive, cell).to(torch.uint8)


def step_widths(code: HeadEncoder) -> Tensor:
    """float64 [C]: the width of a cell of each coordinate, before the token's own gain."""
    sigma = code.sigma.double()
    return sigma * sigma.new_tensor([STEP.get(depth, 1.0) for depth in code.depth.tolist()])


def group_levels(code: HeadEncoder, word_groups: tuple[int, ...], group: int) -> tuple[Tensor, Tensor]:
    """What each index of each coordinate counts in this group [2^b, C] float64, and which coordinates it codes [C]."""
    device = code.depth.device
    own = torch.tensor(word_groups, device=device).repeat_interleave(WORD_ROWS) == group
    coordinate, shift = code.row_coordinate[own].long(), code.row_shift[own]
    cells = torch.arange(2 ** int(code.depth.max()), device=device).unsqueeze(1)
    parts = (2.0 * (cells >> shift & 1) - 1) * code.row_weight[own].double()
    levels = parts.new_zeros(len(cells), len(code.depth)).index_add_(1, coordinate, parts)
    coded = parts.new_zeros(len(code.depth))
    coded[coordinate] = 1
    return levels, coded


def _affine(x: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """x^ = beta + alpha sum_p 2^(planes - 1 - p) t_p: alpha is half a code step, beta the middle of the range."""
    groups = x.unflatten(1, (-1, WORD_ROWS))
    low, high = groups.aminmax(dim=2)
    top, width = 2**planes - 1, (high - low).unsqueeze(2)
    code = torch.round((groups - low.unsqueeze(2)) / torch.where(width > 0, width, 1.0) * top).to(torch.uint8)
    shifts = torch.arange(planes - 1, -1, -1, dtype=torch.uint8, device=x.device).view(-1, 1)
    bits = code.flatten(1).unsqueeze(1) >> shifts & 1
    return bits.flatten(1), torch.cat([(high - low) / top / 2, (high + low) / 2], 1)


def check_shape(x: Tensor, encoder: Encoder) -> None:
    layout = encoder.layout
    if x.dim() != 3 or [*x.shape[1:]] != [layout.heads, layout.head_dim]:
        raise ValueError(f"x has shape {[*x.shape]} instead of [N, {layout.heads}, {layout.head_dim}]")


def check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        token, head = (~x.isfinite().all(2)).nonzero()[0].tolist()
        raise NonFiniteError(token, head)


def check_range(scales: Tensor, encoder: Encoder) -> None:
    """ScaleRangeError for a scale of scales [N, S] that fp16 cannot hold."""
    beyond = ~(scales.abs() <= FP16_MAX)
    if beyond.any():
        token, column = beyond.nonzero()[0].tolist()
        head = sum(column >= end for end in encoder.layout.scale_starts[1:])
        raise ScaleRangeError(token, head)
