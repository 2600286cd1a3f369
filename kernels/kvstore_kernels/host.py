"""Tensors in host memory as numpy holds them: to cut and copy a few rows takes torch several times as long."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,
}
"""Of bfloat16, which numpy does not know, the bits."""


class HostArray(NamedTuple):
    """A tensor of `dtype`; `array` is of NUMPY[dtype] and may be one that cannot be written."""

    array: NDArray[Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "HostArray":
        """Shares the memory of a host tensor, if it is contiguous."""
        tensor = tensor.contiguous()
        return cls((tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy(), tensor.dtype)

    @classmethod
    def read(cls, data: bytes, dtype: torch.dtype, shape: tuple[int, ...], start: int = 0) -> "HostArray":
        """Shares the memory of `data`, which has from `start` on as many bytes as the shape says."""
        return cls(np.ndarray(shape, NUMPY[dtype], data, start), dtype)

    @classmethod
    def joined(cls, parts: "list[HostArray]") -> "HostArray":
        """Rows of one dtype, one part after another."""
        return parts[0] if len(parts) == 1 else cls(np.concatenate([part.array for part in parts]), parts[0].dtype)

    def tensor(self) -> Tensor:
        """In memory of its own."""
        tensor = torch.from_numpy(self.array.copy())
        return tensor if tensor.dtype == self.dtype else tensor.view(self.dtype)
