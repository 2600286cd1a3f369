"""A projection: bases, means and bit allocations for one model in one safetensors file, named by its sha256.

The file holds for each kind `{kind}.basis` F32 [L, H, D, D], `{kind}.weights` and `{kind}.mean` F32 [L, H, D], where
the header says so `{kind}.metric` F32 [L, H, D, D], and U32 [2, L, H] for each of its budgets `words.{bits}`, the words
that every head stores, and for each of its shares `ranks.{share}`, the coordinates that it keeps. Metadata is
{"format", "header"}, the header JSON.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from kvstore_codecs.spec import KINDS, CodecSpec, Fitted, Frozen, Kind, ModelShape
from kvstore_codecs.transform import Basis

FORMAT = "kvstore.projection"
VERSION = 1
HEADER_BYTES_MAX = 1 << 20
_PREFIX_BYTES = 8
_ALIGNMENT_BYTES = 64
_ITEM_BYTES = 4
_TORCH_DTYPES = {"F32": torch.float32, "U32": torch.int32}

Metric = Literal["none", "query", "output"]
Bits = Annotated[float, Field(gt=0, le=6)]
Name = Annotated[str, Field(max_length=64)]
Share = Annotated[float, Field(gt=0, le=1)]
Table = dict[str, tuple[str, tuple[int, ...]]]


class ProjectionHeader(Frozen, frozen=True):
    """What a projection says of itself."""

    min_reader: Annotated[int, Field(ge=1)] = VERSION
    model_fingerprint: Annotated[str, Field(max_length=256)]
    layers: Annotated[int, Field(ge=1, le=1024)]
    kv_heads: Annotated[int, Field(ge=1, le=256)]
    head_dim: Annotated[int, Field(ge=32, le=256, multiple_of=32)]
    metric: Metric
    """What an error is weighed by: nothing (PCA), the queries, or its effect on the layer's output (docs/codecs.md)."""
    max_position: Annotated[int, Field(ge=1, le=2**32)]
    """Positions below it were calibrated."""
    calibration_tokens: Annotated[int, Field(ge=1)]
    calibration_length: Annotated[int, Field(ge=1)]
    """Of one text: at least max_position."""
    data_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    method: Annotated[str, Field(max_length=256)] = "fit"
    seed: int = 0
    has_metrics: bool = False
    budgets: Annotated[tuple[Bits, ...], Field(max_length=64)] = ()
    shares: Annotated[tuple[Share, ...], Field(max_length=64)] = ()
    measured: Annotated[dict[Name, float], Field(max_length=64)] = {}  # noqa: RUF012 - pydantic copies it
    """Figures of how it was made."""

    def tensors(self) -> Table:
        """Name to dtype and shape, in the order of the file."""
        heads = (self.layers, self.kv_heads, self.head_dim)
        table: Table = {}
        for kind in KINDS:
            table[f"{kind}.basis"] = "F32", (*heads, self.head_dim)
            table[f"{kind}.weights"] = "F32", heads
            table[f"{kind}.mean"] = "F32", heads
            if self.has_metrics:
                table[f"{kind}.metric"] = "F32", (*heads, self.head_dim)
        for bits in self.budgets:
            table[f"words.{bits:g}"] = "U32", (len(KINDS), self.layers, self.kv_heads)
        for share in self.shares:
            table[f"ranks.{share:g}"] = "U32", (len(KINDS), self.layers, self.kv_heads)
        return table


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection as its file has it; equal if the files are."""

    sha256: str
    header: ProjectionHeader
    parts: Mapping[str, Tensor]

    def basis(self, kind: Kind) -> Basis:
        return Basis(self.parts[f"{kind}.basis"], self.parts[f"{kind}.weights"])

    def mean(self, kind: Kind) -> Tensor:
        return self.parts[f"{kind}.mean"]

    def metric(self, kind: Kind) -> Tensor | None:
        return self.parts.get(f"{kind}.metric")

    @property
    def weighted(self) -> bool:
        """Whether weights say what an error costs the model, so that bits may move between heads, layers and kinds."""
        return self.header.metric == "output"

    def check_serves(self, spec: CodecSpec, shape: ModelShape) -> None:
        """ValueError, naming the first difference, if it was made for another model or lacks what the codec takes."""
        wants_metric = any(
            isinstance(codec, Fitted) and codec.basis == f"session:{self.sha256}" for _, codec in spec.codecs()
        )
        if wants_metric and not self.header.has_metrics:
            raise ValueError(f"projection {self.sha256[:12]} has no metrics for a session basis")
        for field in ("layers", "kv_heads", "head_dim", "model_fingerprint"):
            ours, theirs = getattr(self.header, field), getattr(shape, field)
            if ours != theirs and not (field == "model_fingerprint" and not (ours and theirs)):
                raise ValueError(f"projection {self.sha256[:12]} has {field} {ours}, the session {theirs}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Projection) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def write_projection(header: ProjectionHeader, parts: Mapping[str, Tensor]) -> bytes:
    """The file. ValueError if header and tensors do not agree, or a reader would refuse it."""
    table = header.tensors()
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    if found != {name: (_TORCH_DTYPES[dtype], shape) for name, (dtype, shape) in table.items()}:
        raise ValueError("the tensors are not those that the header describes")
    text = json.dumps(_fields(header, table), separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX_BYTES + len(text)) % _ALIGNMENT_BYTES)
    data = [parts[name].cpu().contiguous().numpy().tobytes() for name in table]
    file = b"".join([struct.pack("<Q", len(text)), text, *data])
    read_projection(file)
    return file


def read_projection(data: bytes | bytearray | memoryview, sha256: str | None = None) -> Projection:
    """The projection in a file, views of `data`.

    ValueError, saying what, unless it is one, whole, with sound numbers and, if it is given, that hash. Nothing is
    allocated by what the header claims before the file is known to be as long as that takes.
    """
    view = memoryview(data).cast("B")
    digest = hashlib.sha256(view).hexdigest()
    if sha256 not in (None, digest):
        raise ValueError(f"the projection's sha256 is {digest[:12]}.., not {sha256[:12]}..")
    header, start = read_header(view)
    table = header.tensors()
    if len(view) != start + _data_bytes(table):
        raise ValueError(f"a projection of {len(view)} bytes, where its header takes {start + _data_bytes(table)}")
    parts = {}
    for name, (dtype, shape) in table.items():
        size = _ITEM_BYTES * prod(shape)
        raw = bytearray(view[start : start + size])
        parts[name] = torch.frombuffer(raw, dtype=_TORCH_DTYPES[dtype]).view(shape)
        start += size
    _check_numbers(header, parts)
    return Projection(digest, header, parts)


def read_header(view: memoryview) -> tuple[ProjectionHeader, int]:
    """The header and where the data starts, from a file's beginning; ValueError."""
    if len(view) < _PREFIX_BYTES:
        raise ValueError(f"{len(view)} bytes are no projection")
    (length,) = struct.unpack_from("<Q", view)
    if not 2 <= length <= min(HEADER_BYTES_MAX, len(view) - _PREFIX_BYTES):
        raise ValueError(f"a projection's header has at most {HEADER_BYTES_MAX} bytes within the file, not {length}")
    try:
        fields = json.loads(bytes(view[_PREFIX_BYTES : _PREFIX_BYTES + length]))
        metadata = fields["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError("another format")
        stated = json.loads(metadata["header"])
        newer = stated["min_reader"] > VERSION
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("the file is no projection") from error
    if newer:
        raise ValueError(f"the projection needs a reader of version {stated['min_reader']}, this is {VERSION}")
    try:
        header = ProjectionHeader.model_validate(stated)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"the projection's {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if fields != _fields(header, header.tensors()):
        raise ValueError("the projection's tensors are not those that its header describes")
    return header, _PREFIX_BYTES + length


def _check_numbers(header: ProjectionHeader, parts: Mapping[str, Tensor]) -> None:
    words_max = 6 * header.head_dim // 32
    if header.max_position > header.calibration_length:
        raise ValueError(f"max_position {header.max_position} is beyond the {header.calibration_length} calibrated")
    for name, tensor in parts.items():
        if tensor.dtype == torch.int32:
            amount, most = name.partition(".")[0], words_max if name.startswith("words") else header.head_dim
            if (tensor < 0).any() or (tensor > most).any():
                raise ValueError(f"{name}: {amount} of a head are outside [0, {most}]")
        elif not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or Inf")
    for kind in KINDS:
        try:
            Basis(parts[f"{kind}.basis"], parts[f"{kind}.weights"]).check()
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from None


def _fields(header: ProjectionHeader, table: Table) -> dict[str, object]:
    """The JSON of the file's head."""
    later = {name for name in ("shares", "measured") if not getattr(header, name)}  # files from before have neither
    text = json.dumps(header.model_dump(mode="json", exclude=later), sort_keys=True, separators=(",", ":"))
    fields: dict[str, object] = {"__metadata__": {"format": FORMAT, "header": text}}
    end = 0
    for name, (dtype, shape) in table.items():
        start, end = end, end + _ITEM_BYTES * prod(shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return fields


def _data_bytes(table: Table) -> int:
    return sum(_ITEM_BYTES * prod(shape) for _, shape in table.values())
