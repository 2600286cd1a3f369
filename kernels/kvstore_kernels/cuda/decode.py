"""Vectors rebuilt from token-major sketches on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.kept import kept
from kvstore_kernels.types import WORD_ROWS, Expansion, Signs

SLICE = 32
"""Channels of a part of the factors."""
SLOT_UNIT = 4
"""A head has so many slots or a multiple."""
CHUNK = 8
"""Slots that are multiplied at once, at most."""
RUN = 64
"""Tokens of a group of four warps."""
PLACES = ((128, 3, 1), (96, 4, 1), (64, 4, 1), (32, 4, 1), (32, 1, 1), (32, 4, 0), (32, 1, 0))
"""Channels and groups of warps of a block, whether factors lie in shared memory; best first."""
PLACES_OF_WARPS = ((128, 4, 1), *PLACES)
"""The same where warps multiply by themselves."""
SHARED_MOST = 160 * 1024
"""Bytes that every device has."""
LARGEST_FACTOR = 2.0**14
"""The largest rows lie below it: sums of two do not leave float16, and small ones lose no bits in it."""
OUT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Factors:
    """An expansion as decode.cu reads it."""

    plans: Tensor  # [H, 3 + slots] int32
    matrix: Tensor  # [2, H, D / 32, slots, 4, 4, 8, 8] float16
    mean: Tensor  # [H, D] float32
    unit: float

    @property
    def slots(self) -> int:
        """Of the head that has most, filled up to whole chunks."""
        return self.matrix.shape[3]


def macros(expansion: Expansion, slots: int, dtype: torch.dtype, device: torch.device) -> build.Macros:
    if dtype not in OUT_DTYPES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(map(str, OUT_DTYPES))}")
    m = {
        "HEADS": expansion.layout.heads,
        "HEAD_DIM": expansion.layout.head_dim,
        "SLOTS": slots,
        "SCALES": expansion.layout.groups * (1 + expansion.layout.has_offsets),
        "PIECE": 4 if _in_fours(expansion) else 1,
        "OUT": OUT_DTYPES[dtype],
    }
    for channels, warp_groups, resident in PLACES if build.has_warpgroups(device) else PLACES_OF_WARPS:
        placed = {**m, "CHANNELS": channels, "WARP_GROUPS": warp_groups, "RESIDENT": resident}
        if m["HEAD_DIM"] % channels == 0 and shared_bytes(placed) <= SHARED_MOST:
            return placed
    raise ValueError(f"a sketch of {slots} words a head does not fit {SHARED_MOST} bytes of shared memory")


def variants(expansion: Expansion) -> Iterator[build.Variant]:
    device = torch.device("cpu")
    for dtype in OUT_DTYPES:
        m = macros(expansion, factors_of(expansion, device).slots, dtype, device)
        yield "decode", m, shared_bytes(m)


def shared_bytes(m: build.Macros) -> int:
    """What decode.cu lays out."""
    factors = m["RESIDENT"] * m["SLOTS"] * WORD_ROWS * m["CHANNELS"] * (2 if m["OUT"] else 4)
    staged = m["WARP_GROUPS"] * 2 * RUN * (m["SLOTS"] | 4)
    # The plan is last, filled up to a chunk: scales are read in fours, also before it is known that no more are there.
    return factors + 4 * (m["CHANNELS"] + staged + 3 + -(-m["SLOTS"] // CHUNK) * CHUNK)


def decode(signs: Signs, expansion: Expansion, dtype: torch.dtype = torch.float32) -> Tensor:
    """x^ [N, H, D] in `dtype`: float32, float16 or bfloat16."""
    layout, (tokens, words), device = expansion.layout, signs.words.shape, signs.words.device
    if words != layout.words or [*signs.scales.shape] != [tokens, layout.scales]:
        raise ValueError(
            f"words {[*signs.words.shape]} and scales {[*signs.scales.shape]} "
            f"for a layout of {layout.words} words and {layout.scales} scales"
        )
    factors = factors_of(expansion, device)
    m = macros(expansion, factors.slots, dtype, device)
    out = torch.empty(tokens, layout.heads, layout.head_dim, dtype=dtype, device=device)
    if not tokens:
        return out
    contiguous = signs.words.contiguous()
    if contiguous.data_ptr() % (4 * m["PIECE"]):
        contiguous = contiguous.clone()
    slices, shared = layout.head_dim // m["CHANNELS"], shared_bytes(m)
    most = -(-tokens // (RUN * m["WARP_GROUPS"]))
    blocks = max(1, min(most, build.multiprocessors(device) // (slices * layout.heads)))
    build.kernel("decode", device, m, shared).launch(
        (blocks, slices, layout.heads), m["WARP_GROUPS"] * 128, shared, contiguous, signs.scales.contiguous(),
        factors.plans, factors.matrix, factors.mean, out, tokens, layout.words,
        layout.scales, factors.unit,
    )  # fmt: skip
    return out


@kept
def factors_of(expansion: Expansion, device: torch.device) -> Factors:
    """What the kernel wants of `expansion`."""
    layout, offsets = expansion.layout, expansion.offset_basis
    unit = 2.0 ** frexp(max(_largest(matrix) for matrix in (*expansion.matrix, offsets)))[1] / LARGEST_FACTOR
    words = [expansion.read_words(head) for head in range(layout.heads)]
    more = [layout.groups * bool(layout.has_offsets and own) for own in layout.word_groups]
    slots = [max(1, -(-(count + own) // SLOT_UNIT)) * SLOT_UNIT for count, own in zip(words, more, strict=True)]
    plans = torch.full((layout.heads, 3 + max(slots)), -1, dtype=torch.int32)
    matrix = torch.zeros(layout.heads, max(slots), WORD_ROWS, layout.head_dim, dtype=torch.float64)
    for head, (own, count) in enumerate(zip(layout.word_groups, words, strict=True)):
        rows, scales, first = matrix[head], plans[head, 3:], layout.scale_starts[head]
        plans[head, :3] = torch.tensor([layout.word_starts[head], count, slots[head]])
        scales[:count] = first + torch.tensor(own[:count])
        rows[:count] = (expansion.matrix[head].double() / unit).view(count, WORD_ROWS, layout.head_dim)
        if offsets is not None and own:
            end = count + layout.groups
            scales[count:end] = first + layout.groups + torch.arange(layout.groups)
            rows[count:end, 0] = (offsets / unit).half()
            rows[count:end, 2] = offsets / unit - rows[count:end, 0]
    return Factors(plans.to(device), _fragments(matrix).to(device), expansion.mean.to(device).contiguous(), unit)


def _in_fours(expansion: Expansion) -> bool:
    """Whether the words that a head has and reads begin and end at whole fours of a token's row."""
    layout = expansion.layout
    edges = [layout.words, *layout.word_starts, *(expansion.read_words(head) for head in range(layout.heads))]
    return not any(edge % 4 for edge in edges)


def _largest(matrix: Tensor | None) -> float:
    return 0.0 if matrix is None or not matrix.numel() else float(matrix.abs().max())


def _fragments(matrix: Tensor) -> Tensor:
    """Sums and differences of pairs of rows [H, slots, 32, D], two float16 each, in the order that decode.cu gives."""
    first, second = matrix.unflatten(2, (-1, 2)).unbind(3)
    pairs = torch.stack([first + second, first - second], 3)
    halves = torch.stack([pairs.half(), (pairs - pairs.half()).half()])
    heads, slots, _, head_dim = matrix.shape
    rows = halves.view(2, heads, slots, 4, 8, head_dim // SLICE, 4, 4, 2)  # k, i, slice, r / 2, q, r % 2
    return rows.permute(0, 1, 5, 2, 3, 7, 6, 8, 4).reshape(2, heads, head_dim // SLICE, slots, 4, 4, 8, 8)
