"""`qjl`: signs of a block-orthogonal random projection (arXiv 2406.03482), with an own sketch for outlier channels.

Blocks of d orthonormal rows instead of independent Gaussian ones, as the authors' code has it: 2.75 times less variance
for a whole block. Inlier and outlier channels have disjoint sketches and scales, each over its own channels only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore_codecs.basis import block_orthogonal
from kvstore_codecs.plan import DEBIAS, SignPlan
from kvstore_codecs.planes import mean_magnitude
from kvstore_codecs.spec import Qjl
from kvstore_kernels.types import WORD_ROWS, Expansion, HeadEncoder, SignEncoder, SignLayout

INLIERS, OUTLIERS = 0, 1


@dataclass(frozen=True)
class _Group:
    """The rows of one scale group: S over all channels, zero off its `support`, made of blocks of `block` rows."""

    index: int
    rows: Tensor
    support: Tensor
    block: int
    norm_factor: float

    def noise(self, read: int) -> Tensor:
        """[read]: 1 - (2 / pi) m_j / block for a row whose block has m_j rows read.

        The variance of block-orthogonal sketches averaged over directions, in units of (alpha * (S q)_r)^2: a whole
        block has 1 - 2 / pi a row, a block cut short also misses the part of q that it does not see.
        """
        whole, rest = divmod(read, self.block)
        counts = torch.tensor([self.block] * (whole * self.block) + [rest] * rest, dtype=torch.float64)
        return (1 - 2 / math.pi * counts / self.block).float()


def qjl_plan(codec: Qjl, d: int, heads: int, seed: str) -> SignPlan:
    """Words of outlier rows come first and every level reads them; `level_rows` says how many inlier rows it reads."""
    groups = _groups(codec, d, seed)
    order = groups[::-1]
    layout = SignLayout(
        d, len(groups), (tuple(g.index for g in order for _ in range(len(g.rows) // WORD_ROWS)),) * heads
    )
    mean = torch.zeros(heads, d)
    projection = torch.cat([group.rows for group in order])
    m = len(projection)
    head = HeadEncoder(
        projection=projection,
        depth=torch.ones(m, dtype=torch.int32),
        sigma=torch.ones(m),
        row_coordinate=torch.arange(m, dtype=torch.int32),
        row_shift=torch.zeros(m, dtype=torch.int32),
        row_weight=torch.ones(m),
    )
    factors = tuple(group.norm_factor for group in groups) if codec.scale == "paper" else None
    encoder = SignEncoder(layout, (head,) * heads, mean, torch.stack([g.support for g in groups]), factors)
    inliers, outliers = groups[INLIERS], groups[OUTLIERS:]
    levels = []
    for read in level_rows(codec.bits, d):
        matrix = torch.cat([*(group.rows for group in outliers), codec.bits / read * inliers.rows[:read]])
        noise = torch.cat([*(group.noise(len(group.rows)) for group in outliers), inliers.noise(read)])
        query_bits = 12 if outliers else 8
        levels.append(Expansion(layout, (matrix,) * heads, (noise,) * heads, mean, query_bits))
    return SignPlan(layout, encoder, tuple(levels), DEBIAS)


def level_rows(bits: int, d: int) -> tuple[int, ...]:
    """Inlier rows read at each level: about half of the level before, in whole blocks of d above one block, then words.

    Rows are exchangeable, so a prefix of m' rows has m' / m of the sum of |S k| on average and stays unbiased with its
    alpha times m / m'; it is efficient where it ends with a whole block.
    """
    rows = [bits]
    while rows[-1] > WORD_ROWS:
        unit = d if rows[-1] > d else WORD_ROWS
        rows.append(-(-rows[-1] // (2 * unit)) * unit)
    return tuple(rows)


def _groups(codec: Qjl, d: int, seed: str) -> tuple[_Group, ...]:
    """Inliers, then outliers if there are any.

    Outlier blocks live in the space of the outlier channels alone, where they are complete; they are always Haar,
    because Hadamard matrices of a few channels are not random enough, and the paper's constant sqrt(pi/2), which is
    1 + 1/(4 d) too large for blocks of d, is replaced by the exact one.
    """
    inside = torch.ones(d)
    rows = block_orthogonal(codec.basis, codec.bits, d, f"{seed}/inliers")
    if not codec.outlier_channels:
        return (_Group(INLIERS, rows, inside, d, math.sqrt(math.pi / 2) / codec.bits),)
    channels, count = list(codec.outlier_channels), len(codec.outlier_channels)
    inside[channels] = 0
    own = torch.zeros(codec.outlier_bits, d)
    own[:, channels] = block_orthogonal("haar", codec.outlier_bits, count, f"{seed}/outliers")
    exact = 1 / (codec.outlier_bits * math.sqrt(count) * mean_magnitude(count))
    return (
        _Group(INLIERS, rows * inside, inside, d, math.sqrt(math.pi / 2) / codec.bits),
        _Group(OUTLIERS, own, 1 - inside, count, exact),
    )
