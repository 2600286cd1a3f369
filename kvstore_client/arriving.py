"""Rows that come in pieces, each brought to its place as it comes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore_client.errors import Internal


class Rows:
    """Consecutive rows from position `first` on, in `tensor` [n, ...] while it has room: at most `most`."""

    def __init__(self, first: int, tensor: Tensor, most: int) -> None:
        self.first, self.count = first, 0
        self._tensor, self._most = tensor, most

    def place(self, start: int, shape: Sequence[int], dtype: torch.dtype, data: memoryview) -> Callable[[], None]:
        """Takes rows from position `start` on; what it returns copies them, on any thread, in the order of the calls.

        Internal if they do not follow those before, are not such rows, or are too many.
        """
        before, begin, end = self._tensor, self.count, self.count + shape[0]
        if start != self.first + begin:
            raise Internal(f"a part starts at {start}, not {self.first + begin}")
        if dtype != before.dtype or tuple(shape[1:]) != before.shape[1:] or end > self._most:
            raise Internal(
                f"{list(shape)} {dtype} came after {begin} of {self._most} {list(before.shape[1:])} {before.dtype}"
            )
        if end > len(before):
            self._tensor = torch.empty((self._most, *shape[1:]), dtype=dtype)
        self.count, rows = end, self._tensor
        if len(data) != rows[begin:end].nbytes:
            raise Internal(f"{len(data)} bytes came for {list(shape)} {dtype}")

        def copy() -> None:
            if rows is not before:
                rows[:begin] = before[:begin]
            if data:
                np.copyto(rows[begin:end].view(-1).view(torch.uint8).numpy(), np.frombuffer(data, np.uint8))

        return copy

    def tensor(self) -> Tensor:
        """What has come."""
        return self._tensor[: self.count]
