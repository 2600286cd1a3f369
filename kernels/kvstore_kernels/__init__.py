"""Ops on packed sign sketches: encode, score, attend, decode and top-k, on the device that a backend names."""

from kvstore_kernels.backend import Backend, cpu_backend, open_backend
from kvstore_kernels.merge import merge_states
from kvstore_kernels.packing import pack_rows, unpack_rows
from kvstore_kernels.types import (
    STEP,
    WORD_ROWS,
    AffineEncoder,
    DenseRows,
    Encoder,
    Expansion,
    HeadEncoder,
    NonFiniteError,
    Rows,
    ScaleRangeError,
    SignEncoder,
    SignLayout,
    SignRows,
    Signs,
    as_torch_dtype,
    plane_weights,
)
from kvstore_kernels.variance import ScoreNoise, alpha_columns, mean_noise, score_noise, sum_of_squares

__all__ = [
    "STEP",
    "WORD_ROWS",
    "AffineEncoder",
    "Backend",
    "DenseRows",
    "Encoder",
    "Expansion",
    "HeadEncoder",
    "NonFiniteError",
    "Rows",
    "ScaleRangeError",
    "ScoreNoise",
    "SignEncoder",
    "SignLayout",
    "SignRows",
    "Signs",
    "alpha_columns",
    "as_torch_dtype",
    "cpu_backend",
    "mean_noise",
    "merge_states",
    "open_backend",
    "pack_rows",
    "plane_weights",
    "score_noise",
    "sum_of_squares",
    "unpack_rows",
]
