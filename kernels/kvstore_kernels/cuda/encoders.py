"""A sign encoder's tensors as csrc/encode.cu wants them."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.kept import kept
from kvstore_kernels.reference.encode import group_levels, step_widths
from kvstore_kernels.types import WORD_ROWS, HeadEncoder, SignEncoder, SignLayout

UNIT = 128
"""Columns of z that are computed together: a word for each lane of a quad."""
WHOLE = 1.5 * 2**23
"""Added to a float32, makes it a whole number."""
GREATEST = 9
"""The exponent of two above the greatest number of a column: then small ones are not subnormal halves."""
WEIGHTS_RATIO = 256.0
"""Between rows that share a power of two; beyond, the small ones would lose bits."""
NO_COLUMNS = torch.zeros(1, 0)
NO_ROWS = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class DeviceCodes:
    """The projections of one layer and kind on a device, without the means of a session."""

    codes: Tensor  # [codes, 7] int32: Code of encode.cu
    places: Tensor  # [H, 4] int32: Place of tile.cuh
    matrix: Tensor  # float16 [units * 128 * D]
    word_groups: Tensor  # int32 [units * 4]
    columns: Tensor  # float32 [constants * units * 128]
    rows: Tensor  # int16 [words * 32 / grain]
    support: Tensor  # float32 [G, D]
    norm_factor: Tensor  # float32 [G]
    heads: int  # of the code that most share
    units: int  # of the code that has most, as `words`
    words: int
    planes: int  # of the deepest coordinate; 0 where every row is the sign of a coordinate
    whole: bool  # one group has all channels
    grain: int  # rows that neighbouring bits of a plane's word make: 8 or 1
    alike: bool  # vectors that are eight apart have the same head


@dataclass(frozen=True)
class Specialised:
    """The kernel for vectors of one dtype, and what its launch depends on."""

    kernel: build.Kernel
    tile_vectors: int
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class DeviceEncoder:
    """`codes` with the means [H, D] float32 of one session, and the kernels that it has met."""

    codes: DeviceCodes
    mean: Tensor
    kernels: dict[torch.dtype, Specialised] = field(default_factory=dict)


@kept
def on_device(encoder: SignEncoder, device: torch.device) -> DeviceEncoder:
    """`encoder` as the kernel wants it."""
    norm_factor, coded_energy = encoder.norm_factor, encoder.coded_energy
    codes = _codes(encoder.heads, encoder.layout, encoder.support, norm_factor, coded_energy, device)
    return DeviceEncoder(codes, encoder.mean.float().contiguous().to(device))


@dataclass(frozen=True)
class _Code:
    """A projection and the heads that share it."""

    encoder: HeadEncoder
    word_groups: tuple[int, ...]
    heads: list[int]


@dataclass(frozen=True)
class _Part:
    """What one code adds to the tensors of all; `factor` is that of Code."""

    matrix: Tensor  # float32 [units * 128, D]
    columns: Tensor  # float32 [constants, units * 128]
    rows: Tensor  # int64 [m], for each row a bit among the words of the planes
    factor: float


@lru_cache(512)
def _codes(
    heads: tuple[HeadEncoder, ...],
    layout: SignLayout,
    support: Tensor,
    norm_factor: tuple[float, ...] | None,
    coded_energy: bool,
    device: torch.device,
) -> DeviceCodes:
    """Kept once a basis, because sessions that differ in their means share it."""
    codes = _alike(heads, layout)
    coded = [code.encoder for code in codes if code.word_groups]
    planes = max((int(encoder.depth.max()) for encoder in coded), default=0)
    if not coded_energy and all(_are_signs(encoder) for encoder in coded):
        planes = 0
    parts = [
        (_plane_part(code, layout.groups, planes, coded_energy) if planes else _sign_part(code))
        if code.word_groups
        else _Part(torch.zeros(0, layout.head_dim), NO_COLUMNS, NO_ROWS, 0.0)
        for code in codes
    ]
    records, unit, place, word = [], 0, 0, 0
    for code, part in zip(codes, parts, strict=True):
        units, words = len(part.matrix) // UNIT, len(code.word_groups)
        records.append((unit, units, place, len(code.heads), words, word, _bits(part.factor)))
        unit, place, word = unit + units, place + len(code.heads), word + words
    places = [(head, layout.word_starts[head], layout.scale_starts[head], 0) for code in codes for head in code.heads]
    grain = 8 if all(_in_eights(part.rows) for part in parts) else 1
    groups = [group for code in codes for group in (*code.word_groups, *[0] * (-len(code.word_groups) % 4))]
    return DeviceCodes(
        codes=torch.tensor(records, dtype=torch.int32).to(device),
        places=torch.tensor(places, dtype=torch.int32).to(device),
        matrix=torch.cat([_in_lane_order(part.matrix) for part in parts]).half().to(device),
        word_groups=torch.tensor(groups, dtype=torch.int32).to(device),
        columns=torch.cat([_by_column(part.columns).flatten() for part in parts]).to(device),
        rows=torch.cat([part.rows[::grain] for part in parts]).short().to(device),
        support=support.float().contiguous().to(device),
        norm_factor=torch.tensor(norm_factor or (), dtype=torch.float32).to(device),
        heads=max(len(code.heads) for code in codes),
        units=max(len(part.matrix) for part in parts) // UNIT,
        words=max(len(code.word_groups) for code in codes),
        planes=planes,
        whole=layout.groups == 1 and bool((support == 1).all()),
        grain=grain,
        alike=all(8 % len(code.heads) == 0 for code in codes),
    )


def _alike(heads: tuple[HeadEncoder, ...], layout: SignLayout) -> list[_Code]:
    """Heads with the same encoder together; those that store nothing too, because their input is checked."""
    alike: dict[tuple[int, tuple[int, ...]], _Code] = {}
    for head, groups in enumerate(layout.word_groups):
        key = (id(heads[head]) if groups else 0, groups)
        alike.setdefault(key, _Code(heads[head], groups, [])).heads.append(head)
    return list(alike.values())


def _weighted(encoder: HeadEncoder) -> Tensor:
    """The projection of every row times its weight [m, D]."""
    return encoder.projection[encoder.row_coordinate.long()] * encoder.row_weight.unsqueeze(1)


def _are_signs(encoder: HeadEncoder) -> bool:
    """Every row is the sign of a coordinate, and rows with their weights can share a power of two."""
    most = _weighted(encoder).abs().amax(1)
    even = most.max() <= WEIGHTS_RATIO * most[most > 0]
    return bool((encoder.depth <= 1).all() and (encoder.row_weight > 0).all() and even.all())


def _sign_part(code: _Code) -> _Part:
    """-P with the rows' weights in it."""
    matrix = _weighted(code.encoder)
    exponent = GREATEST - torch.frexp(matrix.abs().max()).exponent
    return _Part(-_padded(torch.ldexp(matrix, exponent), 0), NO_COLUMNS, NO_ROWS, 2.0 ** int(exponent))


def _plane_part(code: _Code, groups: int, planes: int, coded_energy: bool) -> _Part:
    """Each coordinate has a power of two of its own, which its constants take back: planes.cuh says what these are."""
    encoder, depth = code.encoder, code.encoder.depth
    exponent = GREATEST - torch.frexp(encoder.projection.abs().amax(1)).exponent
    back = torch.ldexp(torch.ones(len(depth)), -exponent)
    own = back * (depth > 0)
    cells = 2.0**depth
    widths = torch.where(depth > 0, step_widths(encoder), 1.0).float()
    sigma = torch.where(depth > 0, encoder.sigma, 1.0)
    constants = [own / sigma, own / widths, WHOLE + cells / 2 * (depth > 0), cells - 1]
    weights = torch.zeros(groups, planes, len(depth))
    row_groups = torch.tensor(code.word_groups).repeat_interleave(WORD_ROWS)
    coordinate, shift = encoder.row_coordinate.long(), encoder.row_shift.long()
    weights.index_put_((row_groups, shift, coordinate), encoder.row_weight, accumulate=True)
    if coded_energy:
        constants += [back * group_levels(encoder, code.word_groups, group)[1].float() for group in range(groups)]
    columns = _padded(torch.stack([*constants, *(back * weights.flatten(0, 1))]), 1)
    rows = (coordinate // WORD_ROWS * planes + shift) * WORD_ROWS + coordinate % WORD_ROWS
    matrix = _padded(torch.ldexp(encoder.projection, exponent.unsqueeze(1)), 0)
    return _Part(matrix, columns, rows, 1 / max(1, int((depth > 0).sum())))


def _in_eights(rows: Tensor) -> bool:
    eights = rows.view(-1, 8)
    return bool(((eights[:, :1] % 8 == 0) & (eights == eights[:, :1] + torch.arange(8))).all())


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _padded(values: Tensor, dim: int) -> Tensor:
    """`values` with zeros up to a multiple of 128 in dimension `dim`."""
    missing = [*values.shape]
    missing[dim] = -values.shape[dim] % UNIT
    return torch.cat([values, values.new_zeros(missing)], dim)


def _in_lane_order(matrix: Tensor) -> Tensor:
    """Rows [units * 128, D] as lanes read them: column n of tile j of a unit is row 32 (n / 2) + 31 - 2 j - n % 2."""
    units, head_dim = len(matrix) // UNIT, matrix.shape[1]
    tiles = matrix.view(units, 4, WORD_ROWS, head_dim).flip(2).view(units, 4, 16, 2, head_dim // 32, 32)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten()


def _by_column(values: Tensor) -> Tensor:
    """Numbers [..., units * 128] in the order in which `project` of tile.cuh gives columns, of each lane four."""
    words = values.unflatten(-1, (values.shape[-1] // UNIT, 4, WORD_ROWS)).flip(-1)
    return words.unflatten(-1, (8, 4)).transpose(-3, -2).flatten(-4)
