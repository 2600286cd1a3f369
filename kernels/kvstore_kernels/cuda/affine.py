"""Min/max codes of groups of channels: the affine codec's side of `encode`."""

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.encoding import INPUTS, Encoding, empty_signs, readable
from kvstore_kernels.cuda.kept import kept
from kvstore_kernels.types import AffineEncoder

THREADS = 256
BLOCK_VECTORS = 64


def macros(encoder: AffineEncoder, dtype: torch.dtype) -> build.Macros:
    return {"HEAD_DIM": encoder.layout.head_dim, "INPUT": INPUTS[dtype], "PLANES": encoder.planes}


@kept
def _on_device(encoder: AffineEncoder, device: torch.device) -> tuple[Tensor, Tensor]:
    """The mean [H, D] float32 and, int32 [H, 2], each head's first word (-1 if it has none) and scale."""
    layout = encoder.layout
    starts = zip(layout.word_starts, layout.scale_starts, layout.word_groups, strict=False)
    places = [(word if groups else -1, scale) for word, scale, groups in starts]
    return encoder.mean.float().contiguous().to(device), torch.tensor(places).int().to(device)


def prepare(x: Tensor, encoder: AffineEncoder, record: Tensor) -> Encoding:
    """The launch that encodes x [N, H, D]."""
    layout, x = encoder.layout, readable(x)
    signs = empty_signs(len(x), layout, x.device)
    mean, places = _on_device(encoder, x.device)
    return Encoding(
        signs,
        record,
        build.kernel("affine", x.device, macros(encoder, x.dtype)),
        (-(-len(x) * layout.heads // BLOCK_VECTORS), 1, 1),
        THREADS,
        0,
        (x, mean, places, signs.words, signs.scales, record, len(x), x.stride(0), layout.heads, layout.words,
         layout.scales),
    )  # fmt: skip
