"""What a device with memory of its own does besides the ops."""

from typing import Protocol

import torch
from torch import Tensor

from kvstore_kernels.cuda.pages import Pages
from kvstore_kernels.types import SignLayout, Signs


class Paging(Protocol):
    """Calls put work on the device's stream in their order and do not wait for it."""

    def allocate(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes] on the device, of any content; torch.OutOfMemoryError if there is not so much."""
        ...

    def free_bytes(self) -> int:
        """Of the device's memory, at this moment."""
        ...

    def upload(self, host: Tensor) -> Tensor:
        """A copy on the device."""
        ...

    def pack(self, signs: Signs, layout: SignLayout, pages: Pages, *, values: bool, keep: bool) -> None:
        """Writes host `signs` as rows [pages.first, pages.end) of keys or of values.

        In the first page rows below pages.first stay as they are with `keep`; every other row outside becomes zero.
        """
        ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies to and from at full speed."""
        ...
