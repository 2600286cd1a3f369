"""A tensor that grows at its end: appended rows never move what a reader already holds."""

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_ROWS = 256
Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


def pageable(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Plain host memory."""
    return torch.empty(shape, dtype=dtype)


class GrowingRows:
    """[N, ...] with room to grow. A view stays valid: rows are written once, and growth copies to a new buffer."""

    def __init__(self, width: tuple[int, ...], dtype: torch.dtype, allocate: Allocate = pageable) -> None:
        self._allocate = allocate
        self._buffer = torch.empty((0, *width), dtype=dtype)
        self.length = 0

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def reserve(self, rows: int) -> None:
        """Makes room for `rows` in all, at once."""
        if rows > self._buffer.shape[0]:
            grown = self._allocate((rows, *self._buffer.shape[1:]), self._buffer.dtype)
            grown[: self.length] = self._buffer[: self.length]
            self._buffer = grown

    def make_room(self, count: int) -> None:
        """For so many rows more: all of `extend` that memory may lack for."""
        needed = self.length + count
        if needed > self._buffer.shape[0]:
            self.reserve(max(needed, 2 * self._buffer.shape[0], FIRST_ROWS))

    def extend(self, rows: Tensor) -> None:
        """Appends `rows` [n, ...]."""
        self.make_room(len(rows))
        needed = self.length + len(rows)
        self._buffer[self.length : needed] = rows
        self.length = needed

    def between(self, start: int, end: int) -> Tensor:
        """Rows [start, end), a view."""
        return self._buffer[start:end]
