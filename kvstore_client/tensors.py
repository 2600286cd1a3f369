"""Torch tensors as protobuf tensors and back: little-endian, contiguous, checked.

Sign words are uint32 on the wire and int32 bit patterns in torch, which has no uint32 arithmetic.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from kvstore_client.errors import Internal, invalid
from kvstore_proto.v1 import kvstore_pb2 as pb

TO_PROTO: "dict[torch.dtype, pb.Dtype.ValueType]" = {
    torch.float32: pb.DTYPE_FLOAT32,
    torch.float16: pb.DTYPE_FLOAT16,
    torch.bfloat16: pb.DTYPE_BFLOAT16,
    torch.int32: pb.DTYPE_UINT32,
    torch.int64: pb.DTYPE_INT64,
}
FROM_PROTO: dict[int, torch.dtype] = {wire: dtype for dtype, wire in TO_PROTO.items()}


def data_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes; no copy if it is contiguous and on the CPU. Valid while the tensor keeps its memory."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def to_proto(tensor: Tensor, field: str = "tensor") -> pb.Tensor:
    """InvalidArgument for a dtype the service does not know."""
    if tensor.dtype not in TO_PROTO:
        raise invalid(field, f"dtype {tensor.dtype} is not one of {', '.join(map(str, TO_PROTO))}")
    return pb.Tensor(dtype=TO_PROTO[tensor.dtype], shape=tensor.shape, data=data_of(tensor).tobytes())


def from_proto(message: pb.Tensor, *, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """A CPU tensor of its own memory. Internal if it is not of `dtype` and `shape`, or its data is not of its shape."""
    found, size = FROM_PROTO.get(message.dtype), tuple(message.shape)
    if found is None or (dtype is not None and found != dtype):
        raise Internal(f"the server sent a tensor of dtype {message.dtype}, not {dtype}")
    if shape is not None and size != tuple(shape):
        raise Internal(f"the server sent a tensor of shape {list(size)}, not {list(shape)}")
    data = message.data
    if len(data) != prod(size) * found.itemsize:
        raise Internal(f"the server sent {len(data)} bytes for a {found} tensor of shape {list(size)}")
    tensor = torch.empty(size, dtype=found)
    if data:
        tensor.view(-1).view(torch.uint8).numpy().data[:] = data
    return tensor
