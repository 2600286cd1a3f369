"""K and V of one append as frames, in the order of layers, kinds and tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kvstore_client.errors import invalid
from kvstore_client.tensors import data_of
from kvstore_client.wire import Frame
from kvstore_codecs.spec import KINDS, Kind, ModelShape
from kvstore_kernels.types import as_torch_dtype
from kvstore_proto.v1 import kvstore_pb2 as pb

FRAME_BYTES = 2 << 20
"""Data of one frame: between 1 and 4 MiB a stream is fastest."""

PartNumber: TypeAlias = "pb.Part.ValueType"
KIND_NUMBERS: "dict[Kind, pb.Kind.ValueType]" = {"keys": pb.KIND_KEYS, "values": pb.KIND_VALUES}

Layers = Tensor | Sequence[Tensor]
"""[layers, tokens, kv_heads, d], or [tokens, kv_heads, d] for each layer."""


@dataclass(frozen=True)
class Block:
    """Keys and values of consecutive tokens: for each layer [tokens, kv_heads, d], views of the caller's tensors."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return self.keys[0].shape[0]

    def of(self, layer: int, kind: Kind) -> Tensor:
        return (self.keys if kind == "keys" else self.values)[layer]

    def slice(self, start: int, end: int) -> "Block":
        return Block(tuple(k[start:end] for k in self.keys), tuple(v[start:end] for v in self.values))

    def copy(self) -> "Block":
        """In memory of its own."""
        return Block(tuple(k.clone() for k in self.keys), tuple(v.clone() for v in self.values))

    @classmethod
    def joined(cls, blocks: "Sequence[Block]") -> "Block":
        keys = zip(*(block.keys for block in blocks), strict=True)
        values = zip(*(block.values for block in blocks), strict=True)
        return cls(tuple(map(torch.cat, keys)), tuple(map(torch.cat, values)))


def block_of(k: Layers, v: Layers, shape: ModelShape) -> Block:
    """InvalidArgument unless both have the session's layers, heads, width and dtype, and equally many tokens."""
    block = Block(_layers("k", k, shape), _layers("v", v, shape))
    if block.values[0].shape[0] != block.tokens:
        raise invalid("v", f"has {block.values[0].shape[0]} tokens, k has {block.tokens}")
    return block


def _layers(field: str, given: Layers, shape: ModelShape) -> tuple[Tensor, ...]:
    layers = tuple(given.unbind(0)) if isinstance(given, Tensor) and given.dim() == 4 else tuple(given)
    if len(layers) != shape.layers:
        raise invalid(field, f"has {len(layers)} layers, the session {shape.layers}", limit=shape.layers)
    dtype = as_torch_dtype(shape.dtype)
    tokens = layers[0].shape[0] if layers[0].dim() else 0
    for number, layer in enumerate(layers):
        if tuple(layer.shape) != (tokens, shape.kv_heads, shape.head_dim):
            expected = f"[{tokens}, {shape.kv_heads}, {shape.head_dim}]"
            raise invalid(field, f"layer {number} has shape {list(layer.shape)} instead of {expected}")
        if layer.dtype != dtype:
            raise invalid(field, f"layer {number} has dtype {layer.dtype}, the session {dtype}")
    return layers


def raw_frames(block: Block) -> Iterator[Frame]:
    """All rows of a block."""
    for layer in range(len(block.keys)):
        for kind in KINDS:
            yield from part_frames(layer, kind, pb.PART_ROWS, block.of(layer, kind))


def part_frames(layer: int, kind: Kind, part: "PartNumber", tensor: Tensor, token_offset: int = 0) -> Iterator[Frame]:
    """Frames of one part: `tensor` [tokens, ...] starts `token_offset` tokens after the append's start."""
    if not tensor.numel():
        return
    step = max(1, FRAME_BYTES * tensor.shape[0] // (tensor.numel() * tensor.element_size()))
    for first in range(0, tensor.shape[0], step):
        piece = tensor[first : first + step]
        head = pb.AppendFrame(
            layer=layer,
            kind=KIND_NUMBERS[kind],
            part=part,
            token_offset=token_offset + first,
            tokens=piece.shape[0],
            heads=piece.shape[1] if part == pb.PART_ROWS else 0,
        )
        yield Frame(head, data_of(piece))
