"""Orthonormal bases made from a seed, whose bytes are the same on every machine with IEEE arithmetic.

No random generator and no linear-algebra library takes part: random bits are SHAKE-256 of the seed's text, Gaussians
come from one table of rounded quantiles, and every sum has a fixed order.
"""

import hashlib
import math
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_QUANTILE_BITS = 16
_TABLE_GRID = 2.0**20
_COSINE_GRID = 2.0**30


def random_bytes(seed: str, count: int) -> bytes:
    """The first `count` bytes of SHAKE-256 of the seed's UTF-8 text."""
    return hashlib.shake_256(seed.encode()).digest(count)


@cache
def gaussian_table() -> NDArray[np.float64]:
    """The normal quantiles at (i + 1/2) / 2^16, rounded to 2^-20 so that no last bit of a math library shows."""
    count = 1 << _QUANTILE_BITS
    upper = [NormalDist().inv_cdf((count / 2 + i + 0.5) / count) for i in range(count // 2)]
    rounded = np.round(np.array(upper) * _TABLE_GRID) / _TABLE_GRID
    return np.concatenate([-rounded[::-1], rounded])


def gaussians(seed: str, count: int) -> NDArray[np.float64]:
    """`count` independent normal numbers: little-endian 16-bit words of the seed's stream, looked up in the table."""
    return gaussian_table()[np.frombuffer(random_bytes(seed, 2 * count), "<u2")]


def haar(d: int, seed: str) -> Tensor:
    """A Haar-distributed orthogonal matrix, float32 [d, d].

    The product of d - 1 Householder reflections of Gaussian vectors (Stewart 1980), with the signs of column i and of
    the last column that make it exactly Haar. The vectors are read from the seed's stream in order of length, d first.
    """
    normal = gaussians(seed, d * (d + 1) // 2)
    starts = [i * d - i * (i - 1) // 2 for i in range(d)]
    q = np.eye(d)
    q[-1, -1] = math.copysign(1.0, normal[-1])
    for i in range(d - 2, -1, -1):
        v = normal[starts[i] : starts[i] + d - i].copy()
        sign = math.copysign(1.0, v[0])
        v[0] += sign * math.sqrt(_ordered_sum(v * v))
        v /= math.sqrt(_ordered_sum(v * v))
        block = q[i:, i:]
        block -= (2 * v)[:, None] * _ordered_sum(block * v[:, None])
        block[:, 0] *= -sign
    return torch.from_numpy(q.astype(np.float32))


def hadamard(d: int, seed: str) -> Tensor:
    """A randomised orthonormal Hadamard matrix, float32 [d, d]: K diag(s).

    K is the Kronecker product of the Sylvester matrix of the largest power of two in d and the orthonormal DCT-II of
    the odd rest; bit j of the seed's stream (least significant first) set makes s_j -1.
    """
    odd = d // (d & -d)
    matrix = _cosines(odd)
    for _ in range((d & -d).bit_length() - 1):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.unpackbits(np.frombuffer(random_bytes(seed, -(-d // 8)), np.uint8), bitorder="little")[:d]
    scaled = matrix / math.sqrt(d // odd) * (1.0 - 2.0 * signs)
    return torch.from_numpy(scaled.astype(np.float32))


def orthonormal(basis: str, d: int, seed: str) -> Tensor:
    """The named basis, `haar` or `hadamard`: float32 [d, d]."""
    return haar(d, seed) if basis == "haar" else hadamard(d, seed)


def block_orthogonal(basis: str, rows: int, d: int, seed: str) -> Tensor:
    """A sketch matrix S, float32 [rows, d]: independent orthonormal blocks times sqrt(d), the last one truncated.

    Block i has the seed `{seed}/{i}`. The rows of a Hadamard block come in an order drawn from the seed as well: its
    leading rows alone are constant over halves of the channels, and a level reads leading rows.
    """
    blocks = []
    for i in range(-(-rows // d)):
        block = orthonormal(basis, d, f"{seed}/{i}")
        if basis == "hadamard":
            keys = np.frombuffer(random_bytes(f"{seed}/{i}/order", 8 * d), "<u8")
            block = block[torch.from_numpy(np.argsort(keys, kind="stable"))]
        blocks.append(block)
    return torch.cat(blocks)[:rows] * float(np.float32(math.sqrt(d)))


def _cosines(n: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II of size n, rounded for the same reason as the Gaussians."""
    k, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    matrix = np.cos(math.pi * (j + 0.5) * k / n) * np.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n))
    return np.round(matrix * _COSINE_GRID) / _COSINE_GRID


def _ordered_sum(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over the first axis, term by term: numpy's own sum may pair terms as the machine's vectors suggest."""
    return np.add.accumulate(terms, axis=0)[-1]
