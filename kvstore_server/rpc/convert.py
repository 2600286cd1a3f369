"""Protobuf messages to plain values and back, with the checks that need no session."""

import json
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from kvstore_codecs.spec import CodecSpec, Kind, ModelShape
from kvstore_kernels import as_torch_dtype
from kvstore_kernels.host import HostArray
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import varint
from kvstore_server.errors import InvalidArgument
from kvstore_server.rpc.append_messages import CutFrame
from kvstore_server.sessions.assembly import AppendHeader, Encoding, Frame
from kvstore_server.sessions.model import FetchedPart, Fidelity, Precision, SessionInfo
from kvstore_server.storage.geometry import Part

T = TypeVar("T")
_DATA = bytes([pb.Tensor.DATA_FIELD_NUMBER << 3 | 2])

DTYPES: dict[int, torch.dtype] = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_UINT32: torch.int32,
    pb.DTYPE_INT64: torch.int64,
}
EXPONENTS = {
    torch.float32: (np.uint32(0x7F80_0000), np.uint32(0x0080_0000)),
    torch.float16: (np.uint16(0x7C00), np.uint16(0x0400)),
    torch.bfloat16: (np.uint16(0x7F80), np.uint16(0x0080)),
}
"""The bits that are all set in NaN and Inf alone, and the lowest of them: to add it carries into the sign then."""
FLOATS: tuple[pb.Dtype.ValueType, ...] = (pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16, pb.DTYPE_BFLOAT16)
DTYPE_NAMES: dict[int, Literal["float32", "float16", "bfloat16"]] = {
    pb.DTYPE_FLOAT32: "float32",
    pb.DTYPE_FLOAT16: "float16",
    pb.DTYPE_BFLOAT16: "bfloat16",
}
DTYPE_NUMBERS: dict[torch.dtype, pb.Dtype.ValueType] = {
    torch.float32: pb.DTYPE_FLOAT32,
    torch.float16: pb.DTYPE_FLOAT16,
    torch.bfloat16: pb.DTYPE_BFLOAT16,
    torch.int32: pb.DTYPE_UINT32,
    torch.int64: pb.DTYPE_INT64,
}
KIND_NUMBERS: dict[Kind, pb.Kind.ValueType] = {"keys": pb.KIND_KEYS, "values": pb.KIND_VALUES}
KIND_NAMES: dict[int, Kind] = {pb.KIND_KEYS: "keys", pb.KIND_VALUES: "values"}
PART_NUMBERS: dict[FetchedPart, pb.Part.ValueType] = {
    "rows": pb.PART_ROWS,
    "words": pb.PART_WORDS,
    "scales": pb.PART_SCALES,
    "basis": pb.PART_BASIS,
    "weights": pb.PART_WEIGHTS,
}
PART_NAMES: dict[int, Part] = {pb.PART_ROWS: "rows", pb.PART_WORDS: "words", pb.PART_SCALES: "scales"}
ENCODING_NAMES: dict[int, Encoding] = {pb.ENCODING_RAW: "raw", pb.ENCODING_SKETCH: "sketch"}
LSE_FACTORS: dict[int, float] = {pb.LSE_BASE_UNSPECIFIED: 1.0, pb.LSE_BASE_E: 1.0, pb.LSE_BASE_2: 1.4426950408889634}


def chosen(names: Mapping[int, T], number: int, field: str) -> T:
    """The value an enum number stands for; InvalidArgument naming `field` for an unknown or unspecified one."""
    if number not in names:
        raise InvalidArgument(field, f"{number} is not one of {sorted(names)}")
    return names[number]


def tensor_from(message: pb.Tensor, field: str, dims: int) -> Tensor:
    """A float tensor of `dims` dimensions, finite."""
    return host_from(message, field, dims).tensor()


def host_from(message: pb.Tensor, field: str, dims: int) -> HostArray:
    """As tensor_from, in the message's bytes."""
    number, shape = message.dtype, tuple(message.shape)
    if number not in FLOATS:
        raise InvalidArgument(f"{field}.dtype", "must be float32, float16 or bfloat16")
    if len(shape) != dims or min(shape) < 1 or max(shape) > 2**31:
        raise InvalidArgument(f"{field}.shape", f"{list(shape[:8])} does not have {dims} positive dimensions")
    host = read_floats(message.data, DTYPES[number], shape, field)
    check_finite(host, field)
    return host


def read_floats(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], field: str) -> HostArray:
    """That, of a message whose other fields are known to be good; NaN and Inf are not looked for."""
    size = prod(shape) * dtype.itemsize
    if len(data) != size:
        raise InvalidArgument(f"{field}.data", f"{len(data)} bytes instead of {size}")
    return HostArray.read(data, dtype, shape)


def check_finite(host: HostArray, field: str) -> None:
    exponent, lowest = EXPONENTS[host.dtype]
    bits = host.array.view(exponent.dtype)
    if np.bitwise_or.reduce((bits & exponent) + lowest, axis=None) > exponent:
        raise InvalidArgument(field, "holds NaN or Inf")


def tensor_to(tensor: Tensor) -> pb.Tensor:
    data = HostArray.of(tensor).array.tobytes()
    return pb.Tensor(dtype=DTYPE_NUMBERS[tensor.dtype], shape=tensor.shape, data=data)


@lru_cache(1024)
def tensor_head(tag: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """The bytes of a Tensor field up to its data."""
    size = prod(shape) * dtype.itemsize
    head = pb.Tensor(dtype=DTYPE_NUMBERS[dtype], shape=shape).SerializeToString() + _DATA + varint(size)
    return tag + varint(len(head) + size) + head


def shape_from(message: pb.ModelShape) -> ModelShape:
    groups = message.layer_groups
    if not groups:
        raise InvalidArgument("shape.layer_groups", "is empty")
    first = groups[0]
    if (
        any(
            (g.kv_heads, g.query_heads, g.k_dim, g.v_dim)
            != (first.kv_heads, first.query_heads, first.k_dim, first.v_dim)
            for g in groups
        )
        or first.k_dim != first.v_dim
    ):
        raise InvalidArgument("shape.layer_groups", "all layers must have equal heads and dims, and k_dim = v_dim")
    try:
        return ModelShape(
            layers=sum(g.count for g in groups),
            kv_heads=first.kv_heads,
            query_heads=first.query_heads,
            head_dim=first.k_dim,
            dtype=chosen(DTYPE_NAMES, message.dtype, "shape.dtype"),
            sm_scale=message.sm_scale or max(first.k_dim, 1) ** -0.5,
            logit_soft_cap=message.logit_soft_cap,
            model_fingerprint=message.model_fingerprint,
        )
    except ValidationError as error:
        raise _refused("shape", error) from None


def shape_to(shape: ModelShape) -> pb.ModelShape:
    group = pb.LayerGroup(
        count=shape.layers,
        kv_heads=shape.kv_heads,
        query_heads=shape.query_heads,
        k_dim=shape.head_dim,
        v_dim=shape.head_dim,
    )
    return pb.ModelShape(
        layer_groups=[group],
        dtype=DTYPE_NUMBERS[as_torch_dtype(shape.dtype)],
        sm_scale=shape.sm_scale,
        logit_soft_cap=shape.logit_soft_cap,
        model_fingerprint=shape.model_fingerprint,
    )


def spec_from(text: str) -> CodecSpec:
    try:
        return CodecSpec.model_validate_json(text)
    except ValidationError as error:
        raise _refused("codec_json", error) from None


def session_to(info: SessionInfo) -> pb.Session:
    return pb.Session(
        name=info.name,
        generation=info.generation,
        length=info.length,
        shape=shape_to(info.shape),
        codec_json=json.dumps(info.spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":")),
        codec_fingerprint=info.spec.fingerprint,
        fitted=info.fitted,
        exact_end=info.exact_end,
        ttl_seconds=info.ttl_seconds,
        pinned=info.pinned,
        created_unix_seconds=info.created_unix_seconds,
        stored_bytes=info.stored_bytes,
        raw_bytes=info.raw_bytes,
        forked_from=info.forked_from,
        forked_at=info.forked_at,
        affinity=info.affinity,
        max_position=info.max_position,
        fit_fingerprint=info.fit_fingerprint,
    )


def header_from(message: pb.AppendHeader) -> AppendHeader:
    return AppendHeader(
        session=message.session,
        generation=message.generation,
        start=message.start,
        tokens=message.tokens,
        data_bytes=message.bytes,
        encoding=chosen(ENCODING_NAMES, message.encoding, "header.encoding"),
        fit_fingerprint=message.fit_fingerprint,
        block_hashes=tuple(message.block_hashes),
        block_tokens=message.block_tokens,
    )


def frame_from(request: pb.AppendRequest | CutFrame) -> Frame:
    if isinstance(request, CutFrame):
        message, data = request.head, request.data
    elif request.WhichOneof("body") == "frame":
        message, data = request.frame, request.frame.data
    else:
        raise InvalidArgument("frame", "every message after the header must be a frame")
    return Frame(
        layer=message.layer,
        kind=chosen(KIND_NAMES, message.kind, "frame.kind"),
        part=chosen(PART_NAMES, message.part, "frame.part"),
        token_offset=message.token_offset,
        tokens=message.tokens,
        head_offset=message.head_offset,
        heads=message.heads,
        data=data,
    )


def precision_from(message: pb.Precision) -> Precision:
    return Precision(message.keys_level, message.values_level, message.require_precision)


def fidelity_to(fidelity: Fidelity) -> pb.Fidelity:
    message = pb.Fidelity()
    fill_fidelity(message, fidelity)
    return message


def fill_fidelity(message: pb.Fidelity, fidelity: Fidelity) -> None:
    """Field by field: messages that are made and then copied take longer."""
    message.codec = fidelity.codec
    message.codec_fingerprint = fidelity.codec_fingerprint
    message.precision.keys_level = fidelity.precision.keys_level
    message.precision.values_level = fidelity.precision.values_level
    message.score_stderr = fidelity.score_stderr
    message.exact = fidelity.exact
    message.positions_beyond = fidelity.positions_beyond


def _refused(field: str, error: ValidationError) -> InvalidArgument:
    """The first thing pydantic refused, named by its path below `field`."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in (field, *first["loc"]))
    return InvalidArgument(path, first["msg"])
