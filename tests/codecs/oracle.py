"""A slow float64 reading of the op types, written apart from the kernels: what encode and decode must mean."""

import torch
from torch import Tensor

from kvstore_kernels.types import (
    STEP,
    AffineEncoder,
    Encoder,
    Expansion,
    HeadEncoder,
    SignEncoder,
    SignLayout,
    Signs,
)


def encode(x: Tensor, encoder: Encoder) -> Signs:
    """Signs of x [N, H, D]."""
    layout = encoder.layout
    centred = (x.float() - encoder.mean).double()
    words, scales = [], []
    for head, groups in enumerate(layout.word_groups):
        if not groups:
            continue
        rows = centred[:, head]
        if isinstance(encoder, AffineEncoder):
            bits, head_scales = _affine(rows, encoder.planes, layout.groups)
        else:
            bits = sign_bits(rows, encoder.heads[head])
            head_scales = _alphas(rows, bits, groups, encoder, encoder.heads[head])
        words.append(pack(bits))
        scales.append(head_scales)
    return Signs(torch.cat(words, dim=1), torch.cat(scales, dim=1).half())


def decode(signs: Signs, expansion: Expansion) -> Tensor:
    """x^ [N, H, D] float64 at the expansion's level."""
    layout, heads = expansion.layout, []
    for head in range(layout.heads):
        words, groups = expansion.read_words(head), torch.tensor(layout.word_groups[head])
        start, scale = layout.word_starts[head], layout.scale_starts[head]
        t = 2.0 * unpack(signs.words[:, start : start + words]).double() - 1
        scales = signs.scales[:, scale : layout.scale_starts[head + 1]].double()
        alpha, beta = scales[:, : layout.groups], scales[:, layout.groups :]
        row_alpha = alpha[:, groups[:words].repeat_interleave(32)]
        out = expansion.mean[head].double() + (row_alpha * t) @ expansion.matrix[head].double()
        if expansion.offset_basis is not None:
            out = out + beta @ expansion.offset_basis.double()
        heads.append(out)
    return torch.stack(heads, dim=1)


def project(centred: Tensor, head: HeadEncoder) -> Tensor:
    """z [N, C] float64 of x - mean [N, D]."""
    return centred.double() @ head.projection.double().T


def sign_bits(centred: Tensor, head: HeadEncoder) -> Tensor:
    """The bits of each row [N, m] of x - mean [N, D]."""
    z = project(centred, head) / head.sigma.double()
    coded = head.depth > 0
    gain = z[:, coded].square().mean(dim=1, keepdim=True).sqrt()
    step = torch.tensor([STEP.get(int(b), 1.0) for b in head.depth], dtype=torch.float64)
    half = 2 ** (head.depth.double() - 1)
    index = torch.where(gain > 0, z / (step * gain.clamp(min=1e-300)), torch.zeros_like(z)).ceil() - 1 + half
    index = index.clamp(min=torch.zeros_like(half), max=2 * half - 1).long()
    return (index[:, head.row_coordinate.long()] >> head.row_shift.long()) & 1


def pack(bits: Tensor) -> Tensor:
    """int32 [N, m / 32] of 0/1 [N, m]: bit j of word w is row 32 w + j."""
    words = (bits.reshape(len(bits), bits.shape[1] // 32, 32) << torch.arange(32)).sum(dim=-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def unpack(words: Tensor) -> Tensor:
    """0/1 [N, m] of int32 [N, m / 32]."""
    return ((words[:, :, None].long() >> torch.arange(32)) & 1).reshape(len(words), 32 * words.shape[1])


def _alphas(rows: Tensor, bits: Tensor, groups: tuple[int, ...], encoder: SignEncoder, head: HeadEncoder) -> Tensor:
    z = project(rows, head)
    terms = (2.0 * bits - 1) * head.row_weight.double() * z[:, head.row_coordinate.long()]
    row_group = torch.tensor(groups).repeat_interleave(32)
    alphas = []
    for group in range(encoder.layout.groups):
        energy = (rows.square() * encoder.support[group].double()).sum(dim=1)
        if encoder.norm_factor is not None:
            alphas.append(encoder.norm_factor[group] * energy.sqrt())
            continue
        if encoder.coded_energy:
            energy = z[:, head.depth > 0].square().sum(dim=1)
        along = terms[:, row_group == group].sum(dim=1)
        alphas.append(torch.where(along > 0, energy / along.clamp(min=1e-300), torch.zeros_like(energy)))
    return torch.stack(alphas, dim=1)


def _affine(rows: Tensor, planes: int, groups: int) -> tuple[Tensor, Tensor]:
    grouped = rows.reshape(len(rows), groups, -1)
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    step = (high - low) / (2**planes - 1)
    codes = ((grouped - low[..., None]) / step.clamp(min=1e-300)[..., None]).round().clamp(0, 2**planes - 1).long()
    codes = codes.reshape(len(rows), -1)
    bits = torch.cat([codes >> shift & 1 for shift in range(planes - 1, -1, -1)], dim=1)
    return bits, torch.cat([step / 2, (low + high) / 2], dim=1)


def empty(layout: SignLayout) -> Signs:
    return Signs(torch.empty(0, layout.words, dtype=torch.int32), torch.empty(0, layout.scales, dtype=torch.float16))
