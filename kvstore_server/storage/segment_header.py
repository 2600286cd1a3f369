"""What a segment says of itself, and its form as safetensors metadata (strings only)."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, with_config

from kvstore_server.storage.container import DamagedError
from kvstore_server.storage.geometry import LAYERS_MAX, TOKENS_MAX, Geometry, LayerRun
from kvstore_server.storage.versions import check_readable

FORMAT = "kvstore.segment"
VERSION = 4
"""The newest `min_reader` that this code reads, that of epochs but the first."""
FIRST_VERSION, BASES_VERSION, MERGED_VERSION = 1, 2, 3
"""What it writes as long as nothing newer is in the object."""

Encoding = Literal["raw", "sketch"]
Encoder = Literal["server", "client"]
Hex256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Position = Annotated[int, Field(ge=0)]
Bases = Annotated[int, Field(ge=0, le=LAYERS_MAX)]


@dataclass(frozen=True)
class Identity:
    """Which append an object is; every reader knows it from the key and compares."""

    tenant: str
    session: str
    generation: str
    start: int


class MergedAppend(NamedTuple):
    """One append that a merged object took in, as its own header had it."""

    tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)]
    digest: Hex256
    encoding: Encoding
    encoded_by: Encoder
    created_unix_seconds: Annotated[float, Field(ge=0)]
    block_tokens: Position
    block_hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class SegmentHeader:
    """The facts of one append. `previous` and `previous_digest` are those of the append before it in the session (of a
    shared one for a fork's first), so that objects of two histories cannot be mixed; None and "" at position 0.

    `encoding` is how the bytes came, `encoded_by` who made the sketches. `fit_range` is set if this append made a fit:
    the positions it was computed from. `epoch` is the number, from 0, of the session's fit that its sketches are of.
    `block_hashes` are those of the token-id blocks that end in this append, each of `block_tokens` tokens (0 without
    hashes).

    A merged object has the appends that it took in, in order, in `appends`; what they cannot share is there, and
    `fit_append` says which of them made the fit. Its words are only those that the level `floor` of keys and of values
    reads.
    """

    identity: Identity
    geometry: Geometry
    previous: int | None
    previous_digest: str
    digest: str
    encoding: Encoding
    encoded_by: Encoder
    codec_fingerprint: str
    shape_fingerprint: str
    fit_range: tuple[int, int] | None
    block_hashes: tuple[bytes, ...]
    created_unix_seconds: float
    block_tokens: int = 0
    epoch: int = 0
    appends: tuple[MergedAppend, ...] = ()
    fit_append: int | None = None
    floor: tuple[int, int] = (0, 0)

    @property
    def start(self) -> int:
        return self.identity.start

    @property
    def tokens(self) -> int:
        return self.geometry.tokens

    @property
    def end(self) -> int:
        return self.start + self.tokens


_WHOLE = (0, 0)


@with_config(ConfigDict(allow_inf_nan=False))
@dataclass(frozen=True)
class _Metadata:
    """The metadata, lists decoded, before it becomes a SegmentHeader; names are those of the file."""

    tenant: str
    session: str
    generation: str
    start: Position
    tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)]
    exact: Position
    previous: Position | None
    previous_digest: Hex256 | Literal[""]
    digest: Hex256
    encoding: Encoding
    encoded_by: Encoder
    codec_fingerprint: str
    shape_fingerprint: str
    dtype: Literal["float32", "float16", "bfloat16"]
    kv_heads: Annotated[int, Field(ge=1, le=256)]
    head_dim: Annotated[int, Field(ge=32, le=256, multiple_of=32)]
    layers: Annotated[tuple[LayerRun, ...], Field(min_length=1, max_length=LAYERS_MAX)]
    fit_range: tuple[Position, Position] | None
    fit_bases: tuple[Bases, Bases]
    block_hashes: tuple[Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")], ...]
    created_unix_seconds: Annotated[float, Field(ge=0)]
    block_tokens: Position = 0
    epoch: Position = 0
    fit_append: Position | None = None
    floor: tuple[Position, Position] = _WHOLE


_METADATA = TypeAdapter(_Metadata)
_APPENDS = TypeAdapter(
    tuple[MergedAppend, ...], config=ConfigDict(ser_json_bytes="hex", val_json_bytes="hex", allow_inf_nan=False)
)
_JSON_FIELDS = ("previous", "layers", "fit_range", "block_hashes")
_NO_BASES = (0, 0)


def to_metadata(header: SegmentHeader) -> dict[str, str]:
    identity, geometry = header.identity, header.geometry
    bases = geometry.basis_keys, geometry.basis_values
    return {
        "format": FORMAT,
        "version": str(_version(header)),
        "min_reader": str(_version(header)),
        "tenant": identity.tenant,
        "session": identity.session,
        "generation": identity.generation,
        "start": str(identity.start),
        "tokens": str(geometry.tokens),
        "exact": str(geometry.exact),
        "previous": _json(header.previous),
        "previous_digest": header.previous_digest,
        "digest": header.digest,
        "encoding": header.encoding,
        "encoded_by": header.encoded_by,
        "codec_fingerprint": header.codec_fingerprint,
        "shape_fingerprint": header.shape_fingerprint,
        "dtype": geometry.dtype,
        "kv_heads": str(geometry.kv_heads),
        "head_dim": str(geometry.head_dim),
        "layers": _json(geometry.runs),
        "fit_range": _json(header.fit_range),
        **({} if bases == _NO_BASES else {"fit_bases": _json(bases)}),
        "block_hashes": _json([block.hex() for block in header.block_hashes]),
        "created_unix_seconds": repr(header.created_unix_seconds),
        **({"block_tokens": str(header.block_tokens)} if header.block_tokens else {}),
        **({"epoch": str(header.epoch)} if header.epoch else {}),
        **({"appends": _APPENDS.dump_json(header.appends).decode()} if header.appends else {}),
        **({} if header.fit_append is None else {"fit_append": str(header.fit_append)}),
        **({} if header.floor == _WHOLE else {"floor": _json(header.floor)}),
    }


def from_metadata(metadata: dict[str, str]) -> SegmentHeader:
    """DamagedError if it is no header of ours, FailedPrecondition if a newer version must read it."""
    if metadata.get("format") != FORMAT:
        raise DamagedError("not a segment")
    check_readable(metadata.get("min_reader"), VERSION, "segment")
    try:
        decoded = {name: json.loads(metadata[name]) for name in _JSON_FIELDS}
        decoded["floor"] = json.loads(metadata["floor"]) if "floor" in metadata else _WHOLE
        decoded["fit_bases"] = json.loads(metadata["fit_bases"]) if "fit_bases" in metadata else _NO_BASES
        read = _METADATA.validate_python({**metadata, **decoded})
        appends = _APPENDS.validate_json(metadata["appends"]) if "appends" in metadata else ()
    except (KeyError, ValueError, RecursionError) as error:
        raise DamagedError("header fields") from error
    fitted = read.fit_range is not None
    geometry = Geometry(
        read.tokens, read.exact, read.kv_heads, read.head_dim, read.dtype, read.layers, fitted, *read.fit_bases
    )
    if (
        read.exact > read.tokens
        or max(geometry.layers, *read.fit_bases) > LAYERS_MAX
        or (read.fit_bases != _NO_BASES and not fitted)
        or (appends and sum(append.tokens for append in appends) != read.tokens)
        or (read.fit_append is not None) != bool(appends and fitted)
        or (read.fit_append or 0) >= max(1, len(appends))
    ):
        raise DamagedError("header fields")
    return SegmentHeader(
        identity=Identity(read.tenant, read.session, read.generation, read.start),
        geometry=geometry,
        previous=read.previous,
        previous_digest=read.previous_digest,
        digest=read.digest,
        encoding=read.encoding,
        encoded_by=read.encoded_by,
        codec_fingerprint=read.codec_fingerprint,
        shape_fingerprint=read.shape_fingerprint,
        fit_range=read.fit_range,
        block_hashes=tuple(bytes.fromhex(block) for block in read.block_hashes),
        created_unix_seconds=read.created_unix_seconds,
        block_tokens=read.block_tokens,
        epoch=read.epoch,
        appends=appends,
        fit_append=read.fit_append,
        floor=read.floor,
    )


def _version(header: SegmentHeader) -> int:
    """The oldest that has all that is in the object."""
    if header.epoch or header.appends:
        return VERSION if header.epoch else MERGED_VERSION
    return BASES_VERSION if header.geometry.basis_keys or header.geometry.basis_values else FIRST_VERSION


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
