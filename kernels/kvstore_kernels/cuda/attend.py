"""Attention over stored sign sketches on device pages."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.expand import expand
from kvstore_kernels.cuda.pages import PAGE_TOKENS, DeviceExpansion, SignPages, on_device
from kvstore_kernels.cuda.score import LOG2_E, RING_BYTES, ROW_TILES, TILE_ROWS, row_tiles, split_pages
from kvstore_kernels.shapes import query_group
from kvstore_kernels.types import WORD_ROWS, Expansion

WARPS = 8
RING_PIECES = 8
FINE_ROWS = 3
"""Value rows a channel above which weights have 10 bits instead of 8: the sketch's own error is then below theirs."""
SUMS_MOST = 8
"""Row tiles times value words of a warp: its sums must fit in registers."""
MANY_ROWS = 9
"""Query rows from which attend_many.cu is the faster one."""
MANY_SUMS_MOST = 16
"""The same of its sums, of which it keeps fewer beside them."""
BLOCK_ROWS = 16
"""Of its products."""
EXACT_SUM = 2**22
"""attend_many.cu keeps sums over all units below this."""
RESERVED_BYTES = 1024
"""Of a multiprocessor's shared memory, for each block and once more."""


def macros(
    keys: Expansion, values: Expansion, key_basis: DeviceExpansion, value_basis: DeviceExpansion, rows: int, *,
    soft_cap: bool, debias: bool,
) -> build.Macros:  # fmt: skip
    """The specialisation for `rows` query rows a KV head, as many in one pass as fit; with STAGES attend_many.cu's,
    with WARPGROUPS attend_wide.cu's."""
    value_words = max(1, -(-value_basis.words // WARPS))
    m = {
        "UNITS": key_basis.units.shape[1],
        "PLANES": keys.query_bits,
        "WEIGHT_PLANES": 10 if value_basis.words * WORD_ROWS > FINE_ROWS * values.layout.head_dim else 8,
        "VALUE_WORDS": value_words,
        "KEY_GROUPS": keys.layout.groups,
        "VALUE_GROUPS": values.layout.groups,
        "KEY_OFFSETS": int(keys.layout.has_offsets),
        "VALUE_OFFSETS": int(values.layout.has_offsets),
        "SOFT_CAP": int(soft_cap),
        "DEBIAS": int(debias),
    }
    memory = build.shared_memory_bytes(key_basis.matrix.device)
    for kind in _many_kinds(key_basis.matrix.device) if rows >= MANY_ROWS else ():
        if (many := _placed_many({**m, **kind}, rows, memory)) is not None:
            return many
    tiles = row_tiles(rows)
    while tiles > 1 and (tiles * value_words > SUMS_MOST or _placed(m, tiles, memory) is None):
        tiles //= 2
    placed = _placed(m, tiles, memory)
    if placed is None:
        raise ValueError(f"sketches of {key_basis.words} and {value_basis.words} words a head do not fit shared memory")
    return placed


def merge_splits_macros(m: build.Macros) -> build.Macros:
    """merge_splits.cu's after attend.cu's."""
    return {name: m[name] for name in ("VALUE_GROUPS", "VALUE_OFFSETS")}


def merge_macros(m: build.Macros, head_dim: int, dtype: torch.dtype, rows: int) -> build.Macros:
    """merge.cu's after attend.cu's for `rows` query rows a KV head."""
    own = {"HEAD_DIM": head_dim, "OUT_HALF": int(dtype == torch.float16), "ROWS": 1 if rows < MANY_ROWS else WARPS}
    return {**own, **merge_splits_macros(m)}


def variants(
    keys: Expansion, values: Expansion, *, debias: bool, soft_cap: bool = False, dtype: torch.dtype = torch.float32
) -> Iterator[build.Variant]:
    """For any number of query rows."""
    key_basis, value_basis = (on_device(expansion, torch.device("cpu")) for expansion in (keys, values))
    for tiles in ROW_TILES:
        rows = TILE_ROWS * tiles
        m = macros(keys, values, key_basis, value_basis, rows, soft_cap=soft_cap, debias=debias)
        merging = merge_macros(m, values.layout.head_dim, dtype, rows)
        if m["ROW_TILES"] == tiles:
            yield name_of(m), m, shared_bytes(m)
        yield "merge", merging, 4 * value_basis.width * merging["ROWS"]
        if merging["ROWS"] > 1:
            yield "merge_splits", merge_splits_macros(m), 0


def _placed(m: build.Macros, tiles: int, memory: int) -> build.Macros | None:
    """`m` with the first arrangement that fits registers and so much shared memory, best first."""
    light = tiles * m["VALUE_WORDS"] <= 4 and m["VALUE_GROUPS"] == m["KEY_GROUPS"] == 1
    for blocks, buffers in ((2, 2), (2, 1), (1, 2), (1, 1)):
        most = memory // blocks - RESERVED_BYTES * (3 - blocks)
        placed = {**m, "ROW_TILES": tiles, "BLOCKS": blocks, "BUFFERS": buffers}
        if (blocks == 1 or light) and shared_bytes(placed) <= most:
            return placed
    return None


def _many_kinds(device: torch.device) -> Iterator[build.Macros]:
    """What tells the kernels for many rows apart, the faster first."""
    if build.has_warpgroups(device):
        yield {"WARPGROUPS": 1}
    yield {}


def _placed_many(m: build.Macros, rows: int, memory: int) -> build.Macros | None:
    """`m` for attend_wide.cu or attend_many.cu; None where that cannot be or would not fit."""
    simple = m["KEY_GROUPS"] == m["VALUE_GROUPS"] == 1 and not (m["KEY_OFFSETS"] or m["VALUE_OFFSETS"])
    if not simple or m["UNITS"] * 8 * WORD_ROWS << m["PLANES"] - 1 >= EXACT_SUM:
        return None
    tiles = 8 if rows > BLOCK_ROWS and 8 * m["VALUE_WORDS"] <= MANY_SUMS_MOST else 4
    light = tiles * m["VALUE_WORDS"] <= (8 if m["WEIGHT_PLANES"] == 8 else 4)
    for blocks, stages in ((2, 3), (1, 3)) if "WARPGROUPS" in m else ((2, 3), (2, 2), (1, 3), (1, 2)):
        most = memory // blocks - RESERVED_BYTES * (3 - blocks)
        placed = {**m, "ROW_TILES": tiles, "BLOCKS": blocks, "STAGES": stages}
        if tiles * m["VALUE_WORDS"] <= MANY_SUMS_MOST and (blocks == 1 or light) and shared_bytes(placed) <= most:
            return placed
    return None


def name_of(m: build.Macros) -> str:
    if "WARPGROUPS" in m:
        return "attend_wide"
    return "attend_many" if "STAGES" in m else "attend"


def shared_bytes(m: build.Macros) -> int:
    """What the kernel lays out."""
    return _shared_bytes_many(m) if "STAGES" in m else _shared_bytes_few(m)


def _shared_bytes_many(m: build.Macros) -> int:
    rows = TILE_ROWS * m["ROW_TILES"]
    blocks, fragment = rows // BLOCK_ROWS, 512
    stage = 1024 * WARPS * (m["UNITS"] + m["VALUE_WORDS"]) + 1024
    queries = (1 + (m["PLANES"] > 8)) * m["UNITS"] * blocks * 8 * fragment
    weights = (1 + (m["WEIGHT_PLANES"] > 8)) * 8 * blocks * fragment
    if "WARPGROUPS" in m:  # each step's columns are two halves with 16 bytes after them
        queries += m["UNITS"] * 8 * 32
        weights += 8 * 32
    found = 8 * rows * 4 * (3 + WARPS)
    row = 4 * (5 + 4 + 4 + 3)  # constants, totals, constants again, room
    places = (2 * m["UNITS"] + m["VALUE_WORDS"] + 1) * 4 * 32 * WARPS
    return m["STAGES"] * stage + queries + weights + 2 * found + rows * row + 32 + 2 * 4 * PAGE_TOKENS + 16 + places


def _shared_bytes_few(m: build.Macros) -> int:
    rows = TILE_ROWS * m["ROW_TILES"]
    constants = -(-rows * (1 + 4 * m["KEY_GROUPS"]) * 4 // 16) * 16
    planes = m["ROW_TILES"] * m["UNITS"] * m["PLANES"] // 2 * 256
    weights = m["VALUE_GROUPS"] * m["ROW_TILES"] * m["WEIGHT_PLANES"] // 2 * 256
    stats = rows * (2 + m["VALUE_GROUPS"] * (2 + m["VALUE_OFFSETS"])) * 4
    scales = (m["KEY_GROUPS"] * (1 + m["KEY_OFFSETS"]) + m["VALUE_GROUPS"] * (1 + m["VALUE_OFFSETS"])) * 512
    scale_buffers = 2 if WARPS * m["VALUE_WORDS"] < RING_PIECES else 1
    return planes + constants + WARPS * (m["BUFFERS"] * (weights + stats) + RING_BYTES + scale_buffers * scales)


def attend(
    q: Tensor,
    keys: SignPages,
    values: SignPages,
    *,
    sm_scale: float,
    logit_soft_cap: float = 0.0,
    debias: float = 0.0,
    dtype: torch.dtype = torch.float32,
    beside: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Out [T, Hq, D] in `dtype` (float32 or float16) and natural-log lse float32 [T, Hq] of q [T, Hq, D].

    `keys` and `values` hold the same positions. No positions give (0, -inf). `beside()` is a float32 result over other
    positions, which is merged in: asked for when the rest is under way.
    """
    pages, layout = keys.pages, keys.expansion.layout
    if (pages.first, pages.end) != (values.pages.first, values.pages.end):
        raise ValueError(f"keys of rows {(pages.first, pages.end)}, values of {(values.pages.first, values.pages.end)}")
    group = query_group(q, layout.heads, layout.head_dim)
    if (values.expansion.layout.heads, values.expansion.layout.head_dim) != (layout.heads, layout.head_dim):
        raise ValueError("keys and values differ in heads or head_dim")
    rows = q.shape[0] * group
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if pages.first == pages.end or not rows:
        if beside is None:
            return out.zero_(), lse.fill_(-torch.inf)
        out, lse = beside()
        return out.to(dtype), lse
    key_basis, value_basis = on_device(keys.expansion, q.device), on_device(values.expansion, q.device)
    y = expand(q, key_basis)
    m = macros(
        keys.expansion,
        values.expansion,
        key_basis,
        value_basis,
        rows,
        soft_cap=bool(logit_soft_cap),
        debias=bool(debias),
    )
    partials, sums = _splits(m, y, keys, values, key_basis, value_basis, rows, sm_scale, float(logit_soft_cap), debias)
    _merge(partials, sums, value_basis, None if beside is None else beside(), out, lse, group, m)
    return out, lse


def _splits(
    m: build.Macros, y: Tensor, keys: SignPages, values: SignPages, key_basis: DeviceExpansion,
    value_basis: DeviceExpansion, rows: int, sm_scale: float, soft_cap: float, debias: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each split's sums over value rows [H, splits, R, width] and its other sums [H, splits, R, ..]."""
    pages, heads, device = keys.pages, len(key_basis.matrix), y.device
    page_first, page_end = pages.first // PAGE_TOKENS, -(-pages.end // PAGE_TOKENS)
    split = split_pages(page_end - page_first, heads, device, multiple=1)
    splits = -(-(page_end - page_first) // split)
    partials = torch.empty(heads, splits, rows, value_basis.width, dtype=torch.float32, device=device)
    sums = torch.empty(
        heads, splits, rows, 2 + m["VALUE_GROUPS"] * m["VALUE_OFFSETS"], dtype=torch.float32, device=device
    )
    # In powers of two; with a cap, first as logits.cuh's `capped` takes them.
    unit, cap = (2 * sm_scale / soft_cap * LOG2_E, soft_cap * LOG2_E) if soft_cap else (sm_scale * LOG2_E, 0.0)
    shared = shared_bytes(m)
    grid = (splits, heads, -(-rows // (TILE_ROWS * m["ROW_TILES"])))
    build.kernel(name_of(m), device, m, shared).launch(
        grid, WARPS * 32, shared, pages.slab, pages.table, values.pages.slab, values.pages.table, key_basis.heads,
        value_basis.heads, key_basis.units, value_basis.groups, y, key_basis.noise, partials, sums, page_first,
        page_end, split, pages.first, pages.end, rows, key_basis.length, key_basis.width, value_basis.width, unit, cap,
        debias / 2 * sm_scale, follows=True,
    )  # fmt: skip
    return partials, sums


def _merge(
    partials: Tensor, sums: Tensor, value_basis: DeviceExpansion, beside: tuple[Tensor, Tensor] | None, out: Tensor,
    lse: Tensor, group: int, m: build.Macros,
) -> None:  # fmt: skip
    heads, splits, rows, width = partials.shape
    merging = merge_macros(m, out.shape[2], out.dtype, rows)
    if merging["ROWS"] > 1 and splits > 1:
        merged, merged_sums = partials.new_empty(heads, 1, rows, width), sums.new_empty(heads, 1, rows, sums.shape[3])
        build.kernel("merge_splits", out.device, merge_splits_macros(m)).launch(
            (rows, heads, 1), WARPS * 32, 0, partials, sums, value_basis.heads, merged, merged_sums, splits, width,
            follows=True,
        )  # fmt: skip
        partials, sums, splits = merged, merged_sums, 1
    shared = 4 * width * merging["ROWS"]
    other_out, other_lse = (None, None) if beside is None else (part.contiguous() for part in beside)
    build.kernel("merge", out.device, merging, shared).launch(
        (-(-rows // merging["ROWS"]), heads, out.shape[2] // 32), WARPS * 32, shared, partials, sums,
        value_basis.matrix, value_basis.heads, other_out, other_lse, out, lse, value_basis.length, splits, rows, width,
        out.shape[1], group, follows=True,
    )  # fmt: skip
