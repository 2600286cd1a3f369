"""Which sign planes are worth their bits: one reverse water-filling over all heads that share a budget.

A plane p of a band of coordinates takes off the mean square error `weight * (D_p-1 - D_p)` of each of them, D the error
of a quantiser of so many planes. D is convex, so values fall with p, and taking the best planes first is optimal for
every budget at once: what a smaller budget takes is a prefix of what a larger one takes. Planes are taken a word of 32
rows at a time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvstore_codecs.planes import plane_code
from kvstore_kernels.types import STEP, WORD_ROWS

PLANES_MAX = max(STEP)
_ERROR = np.array([1.0, *(plane_code(planes, planes).mse for planes in STEP)])
PLANE_GAINS = np.round(_ERROR[:-1] - _ERROR[1:], 9)
"""What each further plane takes off the mean square error of a unit coordinate."""


def band_of(d: int) -> int:
    """Coordinates of one band."""
    return 8 if d <= 64 else 16


@dataclass(frozen=True)
class PlaneOrder:
    """All planes of the bands of one head, most valuable first: `bands` and `planes` [P]; `words` their values by word.

    `weights` [D / band] are the mean weights of the bands, which are of `band` coordinates each.
    """

    band: int
    weights: NDArray[np.float64]
    bands: NDArray[np.int64]
    planes: NDArray[np.int64]
    words: NDArray[np.float64]


def plane_order(weights: Tensor) -> PlaneOrder:
    """Of one head with these weights [D]; of equal planes the one of the earlier band comes first."""
    band = band_of(len(weights))
    means = np.add.accumulate(weights.double().numpy().reshape(-1, band), axis=1)[:, -1] / band
    values = (means[:, None] * PLANE_GAINS).reshape(-1)
    order = np.argsort(-values, kind="stable")
    a_word = values[order].reshape(-1, WORD_ROWS // band)
    return PlaneOrder(
        band, means, order // PLANES_MAX, order % PLANES_MAX, np.add.accumulate(a_word, axis=1)[:, -1] * band
    )


def words_by_head(values: NDArray[np.float64], words: int) -> NDArray[np.int64]:
    """How many words each head stores [heads] when all store `words` together, from their values [heads, words_max].

    Each row falls; of equal words the one of the earlier head is taken first.
    """
    chosen = np.argsort(-values.reshape(-1), kind="stable")[:words]
    return np.bincount(chosen // values.shape[1], minlength=len(values))


def words_of(weights: Tensor, bits: float) -> NDArray[np.int64]:
    """Words [P, H] of the heads of P places with weights [P, H, D] that share `bits` a number."""
    values = np.stack([[plane_order(head).words for head in place] for place in weights])
    words = round(bits * weights.numel() / WORD_ROWS)
    return words_by_head(values.reshape(-1, values.shape[2]), words).reshape(values.shape[:2])


def ranks_of(weights: Tensor, share: float) -> NDArray[np.int64]:
    """Leading coordinates [P, H], by their weights, of heads that keep this share of all together."""
    falling = np.minimum.accumulate(weights.double().numpy(), axis=2)
    ranks = words_by_head(falling.reshape(-1, falling.shape[2]), round(share * falling.size))
    return ranks.reshape(falling.shape[:2])
