"""What the encoders' launches share: their input, their result, and the record of what could not be encoded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.types import NonFiniteError, ScaleRangeError, SignLayout, Signs

INPUTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VECTORS_MOST = 2**30
"""Vectors are counted in 32 bits, with room for a block past the end."""
NONE = 2**63 - 1


@dataclass(frozen=True)
class Encoding:
    """A launch that is prepared: `signs` and `record` hold nothing before `run`."""

    signs: Signs
    record: Tensor
    kernel: build.Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Tensor | int | float | None, ...]

    def run(self, *, follows: bool = False) -> None:
        if len(self.signs.words):
            self.kernel.launch(self.grid, self.threads, self.shared_bytes, *self.arguments, follows=follows)


def new_record(device: torch.device) -> Tensor:
    """int64 [2], as token * H + head: the first vector that is not finite, the first whose scale fp16 cannot hold."""
    return torch.full((2,), NONE, dtype=torch.int64, device=device)


def check(record: Tensor, heads: int) -> None:
    """NonFiniteError or ScaleRangeError if the launch over `heads` KV heads noted one; waits for the device."""
    not_finite, beyond = record.tolist()
    if not_finite != NONE:
        raise NonFiniteError(*divmod(not_finite, heads))
    if beyond != NONE:
        raise ScaleRangeError(*divmod(beyond, heads))


def readable(x: Tensor) -> Tensor:
    """x [N, H, D] with the channels of a token one after the other, in 16-byte pieces: a copy if it is not."""
    if x.dtype not in INPUTS:
        raise ValueError(f"x is {x.dtype}, which is none of {', '.join(map(str, INPUTS))}")
    if x.shape[0] * x.shape[1] > VECTORS_MOST:
        raise ValueError(f"x has {x.shape[0] * x.shape[1]} vectors, the limit is {VECTORS_MOST}")
    dense = x.stride()[1:] == (x.shape[2], 1) and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def empty_signs(tokens: int, layout: SignLayout, device: torch.device) -> Signs:
    return Signs(
        torch.empty(tokens, layout.words, dtype=torch.int32, device=device),
        torch.empty(tokens, layout.scales, dtype=torch.float16, device=device),
    )
