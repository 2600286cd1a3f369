"""Random keys and values that can be known again: position p of every session holds pool row p."""

import torch
from torch import Tensor

from kvstore_codecs.spec import ModelShape
from kvstore_kernels import as_torch_dtype

POOL_BYTES = 128 << 20
POOL_TOKENS_MAX = 65_536


class Vectors:
    """Standard normal keys and values; equal seeds give equal ones in every process."""

    def __init__(self, shape: ModelShape, seed: int, multiple: int) -> None:
        """`multiple`: tokens that are used together, and never wrap around the pool's end."""
        self.shape = shape
        wanted = min(POOL_TOKENS_MAX, POOL_BYTES // shape.raw_bytes_per_token)
        self.tokens = max(1, wanted // multiple) * multiple
        size = (2, shape.layers, self.tokens, shape.kv_heads, shape.head_dim)
        made = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(size, generator=made).to(as_torch_dtype(shape.dtype))

    def between(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, end - start, H, D]; end - start at most up to the pool's end."""
        first = start % self.tokens
        k, v = self._pool[:, :, first : first + end - start]
        return k, v

    def reach(self, start: int) -> int:
        """The last position up to which `between` can begin at `start`."""
        return start + self.tokens - start % self.tokens


def queries(shape: ModelShape, seed: int, count: int) -> Tensor:
    """Standard normal rows [count, Hq, D]."""
    size = (count, shape.query_heads, shape.head_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(as_torch_dtype(shape.dtype))
