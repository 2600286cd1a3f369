"""Rows that come in pieces, each brought to its place as it comes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore_client.errors import Internal


class Rows:
    """Consecutive rows from position `first` on, at most `most`; in `tensor` [n, ...] as many as it has room for."""

    def __init__(self, first: int, tensor: Tensor, most: int) -> None:
        self.first, self.count = first, 0
        self._tensors, self._most = [tensor], most
        self._begin = 0
        """How many rows lie in the tensors before the last."""

    def place(self, start: int, shape: Sequence[int], dtype: torch.dtype, data: memoryview) -> Callable[[], None]:
        """Takes rows from position `start` on; what it returns copies them, on any thread.

        Internal if they do not follow those before, are not such rows, or are too many.
        """
        own, begin, end = self._tensors[-1], self.count - self._begin, self.count - self._begin + shape[0]
        if start != self.first + self.count:
            raise Internal(f"a part starts at {start}, not {self.first + self.count}")
        if dtype != own.dtype or tuple(shape[1:]) != own.shape[1:] or self.count + shape[0] > self._most:
            held = f"{self.count} of {self._most} {list(own.shape[1:])} {own.dtype}"
            raise Internal(f"{list(shape)} {dtype} came after {held}")
        if end > len(own):
            own = torch.empty((self._most - self.count, *shape[1:]), dtype=dtype)
            self._tensors[-1] = self._tensors[-1][:begin]
            self._tensors.append(own)
            self._begin, begin, end = self.count, 0, shape[0]
        self.count += shape[0]
        rows = own[begin:end].view(-1).view(torch.uint8)
        if len(data) != len(rows):
            raise Internal(f"{len(data)} bytes came for {list(shape)} {dtype}")
        return lambda: np.copyto(rows.numpy(), np.frombuffer(data, np.uint8)) if data else None

    def tensor(self) -> Tensor:
        """What has come."""
        last = self._tensors[-1][: self.count - self._begin]
        return last if len(self._tensors) == 1 else torch.cat([*self._tensors[:-1], last])
