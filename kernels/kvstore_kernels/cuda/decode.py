"""Vectors rebuilt from token-major sketches on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.kept import kept
from kvstore_kernels.types import WORD_ROWS, Expansion, Signs

SLICE = 32
"""Channels of a block."""
WARPS = 4
TILE_TOKENS = 16
PLACES = ((2, 2, 1, 2), (1, 3, 1, 3), (1, 2, 1, 2), (1, 2, 0, 2), (1, 1, 0, 2))
"""Slices and tiles of a warp, whether factors lie in shared memory, blocks of a multiprocessor; best first."""
GROUPED_PLACES = PLACES[2:]
"""For more than one group."""
SHARED_MOST = 160 * 1024
"""Bytes that every device has."""
SIGN = 64
"""A nonzero of the products' first operand."""
FACTOR_MOST = 127 * 256 + 127
"""Of two bytes, upper and lower."""
OUT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Factors:
    """An expansion as decode.cu reads it."""

    plans: Tensor  # [H, 2 + groups + 2 * steps] int32
    bytes: Tensor  # [H, D / 32, steps, 4, 2, 32, 16] int8
    constants: Tensor  # [H, D / 32, 1 + groups * (1 + offsets), 32] float32

    @property
    def steps(self) -> int:
        """Of the head that has most."""
        return self.bytes.shape[2]


def macros(expansion: Expansion, steps: int, dtype: torch.dtype) -> build.Macros:
    if dtype not in OUT_DTYPES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(map(str, OUT_DTYPES))}")
    m = {
        "HEAD_DIM": expansion.layout.head_dim,
        "STEPS": steps,
        "GROUPS": expansion.layout.groups,
        "OFFSETS": int(expansion.layout.has_offsets),
        "OUT": OUT_DTYPES[dtype],
    }
    for slices, tiles, resident, blocks in PLACES if m["GROUPS"] == 1 else GROUPED_PLACES:
        placed = {**m, "SLICES": slices, "TILES": tiles, "RESIDENT": resident, "BLOCKS": blocks}
        if m["HEAD_DIM"] % (SLICE * slices) == 0 and shared_bytes(placed) * (blocks if resident else 1) <= SHARED_MOST:
            return placed
    raise ValueError(f"a sketch of {2 * steps} words a head does not fit {SHARED_MOST} bytes of shared memory")


def variants(expansion: Expansion) -> Iterator[build.Variant]:
    for dtype in OUT_DTYPES:
        m = macros(expansion, factors_of(expansion, torch.device("cpu")).steps, dtype)
        yield "decode", m, shared_bytes(m)


def shared_bytes(m: build.Macros) -> int:
    """What decode.cu lays out."""
    pitch, constants = 2 * (m["STEPS"] | 1), 1 + m["GROUPS"] * (1 + m["OFFSETS"])
    plan = 2 + m["GROUPS"] + 2 * m["STEPS"]
    staged = WARPS * 2 * TILE_TOKENS * m["TILES"] * pitch
    slices = m["SLICES"]
    return m["RESIDENT"] * slices * m["STEPS"] * 4096 + 4 * (slices * constants * SLICE + staged + plan)


def decode(signs: Signs, expansion: Expansion, dtype: torch.dtype = torch.float32) -> Tensor:
    """x^ [N, H, D] in `dtype`: float32, float16 or bfloat16."""
    layout, (tokens, words), device = expansion.layout, signs.words.shape, signs.words.device
    if words != layout.words or [*signs.scales.shape] != [tokens, layout.scales]:
        raise ValueError(
            f"words {[*signs.words.shape]} and scales {[*signs.scales.shape]} "
            f"for a layout of {layout.words} words and {layout.scales} scales"
        )
    factors = factors_of(expansion, device)
    m = macros(expansion, factors.steps, dtype)
    out = torch.empty(tokens, layout.heads, layout.head_dim, dtype=dtype, device=device)
    if not tokens:
        return out
    slices, shared = layout.head_dim // (SLICE * m["SLICES"]), shared_bytes(m)
    most = -(-tokens // (WARPS * TILE_TOKENS * m["TILES"]))
    blocks = max(1, min(most, m["BLOCKS"] * build.multiprocessors(device) // (slices * layout.heads)))
    build.kernel("decode", device, m, shared).launch(
        (blocks, slices, layout.heads), WARPS * 32, shared, signs.words.contiguous(), signs.scales.contiguous(),
        factors.plans, factors.bytes, factors.constants, out, tokens, layout.words, layout.scales,
    )  # fmt: skip
    return out


def _steps(expansion: Expansion, head: int) -> list[tuple[int, int, int]]:
    """Words of a head in twos that share a scale: (group, word, word), the second -1 where there is none."""
    groups = expansion.layout.word_groups[head][: expansion.read_words(head)]
    steps = []
    for group in range(expansion.layout.groups):
        own = [word for word, of in enumerate(groups) if of == group]
        steps += [(group, *own[i : i + 2], -1)[:3] for i in range(0, len(own), 2)]
    return steps


@kept
def factors_of(expansion: Expansion, device: torch.device) -> Factors:
    """What the kernel wants of `expansion`."""
    layout = expansion.layout
    slices, groups = layout.head_dim // SLICE, layout.groups
    steps_of = [_steps(expansion, head) for head in range(layout.heads)]
    most = max(1, *map(len, steps_of))
    plans = torch.zeros(layout.heads, 2 + groups + 2 * most, dtype=torch.int32)
    fragments = torch.zeros(layout.heads, slices, most, 4, 2, 32, 16, dtype=torch.int8)
    constants = torch.zeros(layout.heads, 1 + groups * (1 + layout.has_offsets), layout.head_dim)
    constants[:, 0] = expansion.mean
    for head, steps in enumerate(steps_of):
        start = layout.word_starts[head]
        firsts = [sum(step[0] < group for step in steps) for group in range(groups + 1)]
        slots = [start + max(word, 0) for step in steps for word in step[1:]]
        scales = layout.scale_starts[head] if layout.word_groups[head] else -1
        plans[head, : 2 + groups + len(slots)] = torch.tensor([scales, *firsts, *slots], dtype=torch.int32)
        if layout.word_groups[head] and expansion.offset_basis is not None:
            constants[head, 1 + groups :] = expansion.offset_basis
        for group, (first, end) in enumerate(pairwise(firsts)):
            if first < end:
                integers, unit = _integers(expansion.matrix[head], [step[1:] for step in steps[first:end]])
                fragments[head, :, first:end] = _fragments(integers)
                constants[head, 1 + group] = unit
    apart = constants.unflatten(2, (slices, SLICE)).transpose(1, 2).contiguous()
    return Factors(plans.to(device), fragments.to(device), apart.to(device))


def _integers(matrix: Tensor, words: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Sums and differences of the pairs of rows of these steps int32 [steps, 64, D], and the value of one [D]."""
    blocks = [*matrix.double().split(WORD_ROWS), torch.zeros(WORD_ROWS, matrix.shape[1], dtype=torch.float64)]
    rows = torch.stack([blocks[word] for step in words for word in step]).view(len(words), WORD_ROWS, 2, -1)
    pairs = torch.stack([rows[:, :, 0] + rows[:, :, 1], rows[:, :, 0] - rows[:, :, 1]], 2).flatten(1, 2)
    most = min(FACTOR_MOST, (2**31 - 1) // (SIGN * WORD_ROWS * len(words)))
    unit = pairs.abs().amax((0, 1)) / most
    integers = torch.round(pairs / torch.where(unit > 0, unit, 1.0)).int()
    return integers, (unit / SIGN).float()


def _fragments(integers: Tensor) -> Tensor:
    """int8 [D / 32, steps, 4, 2, 32, 16] in the order that decode.cu gives."""
    upper = (integers + 128) >> 8
    both = torch.stack([upper, integers - 256 * upper], 1).to(torch.int8)  # [steps, 2, 64, D]
    rows = both.view(
        len(integers), 2, 4, 4, 4, -1, 4, 4, 2
    )  # step, hi lo, register, t, byte, slice, c / 2, tile, c % 2
    return rows.permute(5, 0, 7, 1, 6, 8, 3, 2, 4).reshape(rows.shape[5], len(integers), 4, 2, 32, 16)
