"""Variance of logits over stored sketches."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvstore_kernels.compiled.expand import expand
from kvstore_kernels.compiled.jit import reassociating
from kvstore_kernels.compiled.rows import places_of, scale_array, scale_lines
from kvstore_kernels.shapes import query_group
from kvstore_kernels.types import Expansion


def score_variance(q: Tensor, expansion: Expansion, scales: Tensor) -> Tensor:
    """As `reference.score_variance`."""
    group = query_group(q, expansion.layout.heads, expansion.layout.head_dim)
    squares = np.zeros(scales.shape[1])
    _mean_squares(scale_array(scales), squares)
    noise = expand(q, expansion, places_of(expansion)).noise[:, : len(q) * group].astype(np.float64)
    out = np.zeros((len(q), len(noise), group), np.float32)
    for head, (start, end) in enumerate(pairwise(expansion.layout.scale_starts)):
        own = squares[start : min(end, start + expansion.layout.groups)]
        out[:, head] = (noise[head, :, : len(own)] @ own).reshape(len(q), group)
    return torch.from_numpy(out).flatten(1, 2)


@reassociating
def _mean_squares(scales, out):
    """out[s] = the mean of scales[:, s]^2."""
    for start in range(0, scales.shape[0], 1024):
        lines = scale_lines(scales[start : start + 1024], 0, scales.shape[1])
        for line in range(lines.shape[0]):
            total = 0.0
            for token in range(lines.shape[1]):
                total += np.float64(lines[line, token]) * np.float64(lines[line, token])
            out[line] += total / scales.shape[0]
