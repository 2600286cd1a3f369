"""`affine`: min/max of groups of 32 channels a token to b bits, the value quantiser of QJL and KIVI.

A code is a number of b sign planes: x^ = beta + alpha sum_p 2^(b-1-p) t_p, alpha half a code step, beta the middle of
the range. Means are subtracted as for every other codec, so that o = (sum p) mu + ... holds for all of them; an offset
that is common to the tokens also costs no range then.
"""

import torch

from kvstore_codecs.plan import SignPlan
from kvstore_codecs.spec import Affine
from kvstore_kernels.types import WORD_ROWS, AffineEncoder, Expansion, SignLayout


def affine_plan(codec: Affine, d: int, heads: int) -> SignPlan:
    """Words are plane-major, one word a group; level i reads all planes but the i least significant.

    The planes of a uniform code are independent, so the least-squares weights of a prefix are the same weights and its
    scale is the stored one. Reading r planes leaves an error uniform over 2^(b-r) steps of 2 alpha.
    """
    planes, groups = codec.planes, d // WORD_ROWS
    layout = SignLayout(d, groups, (tuple(range(groups)) * planes,) * heads, has_offsets=True)
    mean = torch.zeros(heads, d)
    offsets = torch.eye(groups).repeat_interleave(WORD_ROWS, dim=1)
    levels = []
    for read in range(planes, 0, -1):
        matrix = torch.cat([2.0 ** (planes - 1 - plane) * torch.eye(d) for plane in range(read)])
        noise = torch.zeros(read * d)
        noise[:d] = (2.0 * 2 ** (planes - read)) ** 2 / 12 / 4 ** (planes - 1)
        levels.append(Expansion(layout, (matrix,) * heads, (noise,) * heads, mean, 8 if planes == 1 else 12, offsets))
    return SignPlan(layout, AffineEncoder(layout, planes, mean), tuple(levels))
