"""Vectors to packed sketches."""

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda import affine
from kvstore_kernels.cuda.encoders import UNIT, DeviceCodes, Specialised, on_device
from kvstore_kernels.cuda.encoding import INPUTS, Encoding, check, empty_signs, new_record, readable
from kvstore_kernels.reference.encode import check_shape
from kvstore_kernels.types import WORD_ROWS, Encoder, SignEncoder, Signs

RESERVED_BYTES = 1024
"""Of a multiprocessor's shared memory, for each block."""
WARPS = (12, 8, 4)
"""A block may have; the first only where registers for it suffice."""
LIGHT_HEAD_DIM = 128
"""The widest vectors of which a warp holds 32."""


def macros(codes: DeviceCodes, encoder: SignEncoder, dtype: torch.dtype) -> build.Macros:
    """The specialisation, but for what `_placed` adds."""
    layout = encoder.layout
    return {
        "HEAD_DIM": layout.head_dim,
        "INPUT": INPUTS[dtype],
        "TILES": 2 if layout.head_dim <= LIGHT_HEAD_DIM else 1,
        "GROUPS": layout.groups,
        "SUPPORT": int(not codes.whole),
        "NORM": int(encoder.norm_factor is not None),
        "CODED_ENERGY": int(encoder.coded_energy),
        "ALIKE": int(codes.alike and not codes.planes),
        "PLANES": codes.planes,
        "GRAIN": codes.grain,
    }


def shared_bytes(m: build.Macros, codes: DeviceCodes) -> int:
    """What encode.cu lays out."""
    means = codes.heads * (16 + 4 * (m["HEAD_DIM"] + 4)) + 4 * m["SUPPORT"] * m["GROUPS"] * m["HEAD_DIM"]
    vectors = m["WARPS"] * 16 * m["TILES"]
    columns = codes.units * UNIT
    together = means + vectors * m["HEAD_DIM"] * (2 if m["INPUT"] else 4) + 2 * m["RESIDENT"] * columns * m["HEAD_DIM"]
    if not m["PLANES"]:
        return together
    constants = 4 + m["GROUPS"] * (m["CODED_ENERGY"] + m["PLANES"])
    bits = vectors * 4 * (columns // WORD_ROWS * m["PLANES"] + 1)
    return together + 4 * constants * columns + 2 * codes.words * WORD_ROWS // m["GRAIN"] + bits


def _placed(m: build.Macros, codes: DeviceCodes, most: int) -> build.Macros:
    """`m` with the matrix in `most` bytes of shared memory if it fits, and as many warps as they and registers hold."""
    light = m["PLANES"] > 1 or (m["ALIKE"] and not m["NORM"])
    light = light and m["HEAD_DIM"] <= LIGHT_HEAD_DIM and not m["SUPPORT"]
    for resident in (1, 0):
        for warps in WARPS[0 if light and resident else 1 :]:
            placed = {**m, "WARPS": warps, "RESIDENT": resident}
            if shared_bytes(placed, codes) <= most:
                return placed
    raise ValueError(f"a sketch of {codes.words} words a head does not fit {most} bytes of shared memory")


def _specialise(codes: DeviceCodes, encoder: SignEncoder, dtype: torch.dtype, device: torch.device) -> Specialised:
    most = build.shared_memory_bytes(device) - RESERVED_BYTES
    m = _placed(macros(codes, encoder, dtype), codes, most)
    # One limit for all launches of a kernel: CuPy shares a module between those that set it.
    kernel = build.kernel("encode", device, m, most)
    return Specialised(kernel, 16 * m["TILES"], 32 * m["WARPS"], shared_bytes(m, codes))


def _prepare(x: Tensor, encoder: Encoder, record: Tensor) -> Encoding:
    check_shape(x, encoder)
    if not isinstance(encoder, SignEncoder):
        return affine.prepare(x, encoder, record)
    layout, device, x = encoder.layout, x.device, readable(x)
    signs = empty_signs(len(x), layout, device)
    ready = on_device(encoder, device)
    codes = ready.codes
    if x.dtype not in ready.kernels:
        ready.kernels[x.dtype] = _specialise(codes, encoder, x.dtype, device)
    own = ready.kernels[x.dtype]
    tiles = -(-len(x) * codes.heads // own.tile_vectors)
    blocks = max(1, build.multiprocessors(device) // len(codes.codes))
    return Encoding(
        signs, record, own.kernel, (min(tiles, blocks), len(codes.codes), 1), own.threads, own.shared_bytes,
        (x, ready.mean, codes.codes, codes.places, codes.matrix, codes.word_groups, codes.columns, codes.rows,
         codes.support, codes.norm_factor, signs.words, signs.scales, record, len(x), x.stride(0), layout.heads,
         layout.words, layout.scales, codes.heads, codes.units, codes.words),
    )  # fmt: skip


def launch(x: Tensor, encoder: Encoder) -> tuple[Signs, Tensor]:
    """Sketches of x [N, H, D], and the record that `encoding.check` reads; never waits."""
    encoding = _prepare(x, encoder, new_record(x.device))
    encoding.run()
    return encoding.signs, encoding.record


def launch_pair(
    keys: Tensor, values: Tensor, key_encoder: Encoder, value_encoder: Encoder
) -> tuple[tuple[Signs, Tensor], tuple[Signs, Tensor]]:
    """`launch` of both; the values start while the last keys are under way."""
    first = _prepare(keys, key_encoder, new_record(keys.device))
    second = _prepare(values, value_encoder, new_record(keys.device))
    first.run()
    second.run(follows=True)
    return (first.signs, first.record), (second.signs, second.record)


def encode(x: Tensor, encoder: Encoder) -> Signs:
    """As `reference.encode`: NonFiniteError and ScaleRangeError name the first bad place. Waits for the device."""
    signs, record = launch(x, encoder)
    check(record, encoder.layout.heads)
    return signs
