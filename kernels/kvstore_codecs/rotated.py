"""`rotated`: a data-oblivious rotation, then b uniform sign planes a coordinate and one scale a token.

The rotation makes every coordinate of any vector nearly normal, so one scalar quantiser fits all; the scale keeps
<x, x^> exact, which makes the code unbiased over rotations (the TurboQuant and RaBitQ family, without a second stage).
"""

import torch

from kvstore_codecs.basis import orthonormal
from kvstore_codecs.plan import DEBIAS, SignPlan
from kvstore_codecs.planes import level_weights, plane_code
from kvstore_codecs.spec import Rotated
from kvstore_kernels.types import WORD_ROWS, Expansion, HeadEncoder, SignEncoder, SignLayout, plane_weights


def rotated_plan(codec: Rotated, d: int, heads: int, seed: str) -> SignPlan:
    """Words are plane-major, most significant plane first; level i reads all planes but the i least significant."""
    planes = codec.planes
    rotation = orthonormal(codec.basis, d, seed)
    layout = SignLayout(d, 1, ((0,) * (planes * d // WORD_ROWS),) * heads)
    mean = torch.zeros(heads, d)
    head = HeadEncoder(
        projection=rotation,
        depth=torch.full((d,), planes, dtype=torch.int32),
        sigma=torch.ones(d),
        row_coordinate=torch.arange(d, dtype=torch.int32).repeat(planes),
        row_shift=torch.arange(planes - 1, -1, -1, dtype=torch.int32).repeat_interleave(d),
        row_weight=torch.tensor(plane_weights(planes)).repeat_interleave(d),
    )
    encoder = SignEncoder(layout, (head,) * heads, mean, support=torch.ones(1, d))
    levels = []
    for read in range(planes, 0, -1):
        weights = level_weights(planes, read, d)
        noise = torch.zeros(read * d)
        noise[:d] = plane_code(planes, read).noise / plane_code(planes, read).weights[0] ** 2
        matrix = torch.cat([weight * rotation for weight in weights])
        query_bits = 8 if planes == 1 else 12
        levels.append(Expansion(layout, (matrix,) * heads, (noise,) * heads, mean, query_bits))
    return SignPlan(layout, encoder, tuple(levels), DEBIAS)
