"""What codecs keep of coordinates, as functions that gradients go through.

Amounts are integers [..., H]: coordinates that a head keeps (`projected`) or words that it stores (`matryoshka`).
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvstore_codecs.allocation import PLANE_GAINS, PLANES_MAX, band_of
from kvstore_codecs.transform import banded
from kvstore_kernels.types import STEP, WORD_ROWS, plane_weights

Codec = Literal["matryoshka", "projected"]
Kept = Callable[[Tensor, Tensor, Tensor], Tensor]
"""z^ [..., H, T, D] of coordinates z [..., H, T, D], weights [..., H, D] and amounts [..., H]."""


def leading(z: Tensor, weights: Tensor, ranks: Tensor) -> Tensor:
    """The first coordinates of each head, the rest 0."""
    return z * (torch.arange(z.shape[-1], device=z.device) < ranks[..., None, None])


def planes(z: Tensor, weights: Tensor, words: Tensor) -> Tensor:
    """What the best words of each head say of z, times the scale that keeps <z, z^> of the coded coordinates.

    Values are those that the encoder stores, before the scale is rounded to fp16. Gradients take rounding for the
    identity inside the quantiser's range, and follow what the width of its cells is made of.
    """
    d = z.shape[-1]
    band = band_of(d)
    mean_weights = weights.unflatten(-1, (-1, band)).mean(-1)
    depth = _depths(mean_weights.detach(), words, band).repeat_interleave(band, -1).unsqueeze(-2)
    sigma, coded, mixer = mean_weights.sqrt().repeat_interleave(band, -1).unsqueeze(-2), depth > 0, _mixer(d, z.device)
    mixed = z @ mixer.T
    unit = mixed / sigma
    gain = ((unit.square() * coded).sum(-1, keepdim=True) / coded.sum(-1, keepdim=True).clamp(min=1) + 1e-12).sqrt()
    y = sigma * gain * _rounded(unit / gain, depth)
    along = (y * mixed).sum(-1, keepdim=True)
    alpha = (mixed.square() * coded).sum(-1, keepdim=True) / torch.where(along > 0, along, 1.0)
    return alpha * y @ mixer


def _depths(weights: Tensor, words: Tensor, band: int) -> Tensor:
    """Planes [..., H, bands] in the best words [..., H] of heads with these band weights [..., H, bands]."""
    values = (weights.unsqueeze(-1) * _quantiser(weights.device)[3]).flatten(-2)
    place = values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    stored = place < (words * (WORD_ROWS // band)).unsqueeze(-1)
    return stored.unflatten(-1, (-1, PLANES_MAX)).sum(-1)


def _rounded(z: Tensor, depth: Tensor) -> Tensor:
    """Reconstruction levels of unit coordinates with so many planes, 0 without any; the identity to gradients."""
    step, end, levels, _ = _quantiser(z.device)
    half = 2 ** (depth - 1).clamp(min=0)
    cell = torch.minimum((z.detach() / step[depth]).floor().long() + half, 2 * half - 1).clamp(min=0)
    inside = torch.minimum(torch.maximum(z, -end[depth]), end[depth])
    return inside + (levels[depth.expand(z.shape), cell] - inside).detach()


@cache
def _quantiser(device: torch.device) -> list[Tensor]:
    """By planes from 0: width of a cell, end of the range, levels [7, 64]; and what each further plane gains [6]."""
    levels, end = np.zeros((PLANES_MAX + 1, 2**PLANES_MAX)), np.zeros(PLANES_MAX + 1)
    for count in STEP:
        signs = 2 * (np.arange(2**count)[:, None] >> np.arange(count - 1, -1, -1) & 1) - 1
        levels[count, : 2**count] = signs @ np.array(plane_weights(count))
        end[count] = 2 * plane_weights(count)[0]
    step = np.array([1.0, *STEP.values()])
    return [torch.from_numpy(each).float().to(device) for each in (step, end, levels, PLANE_GAINS)]


@cache
def _mixer(d: int, device: torch.device) -> Tensor:
    """Hadamard matrices over the bands of d coordinates."""
    return torch.from_numpy(banded(np.eye(d)[None], band_of(d))[0]).float().to(device)


KEPT: dict[Codec, Kept] = {"matryoshka": planes, "projected": leading}
