"""The records of a session's name: canonical JSON with a checksum, numbered without gaps (docs/format.md)."""

import json
from typing import Annotated, Literal

from crc32c import crc32c
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from kvstore_codecs.spec import CodecSpec, Frozen, ModelShape
from kvstore_server.errors import DataLoss, FailedPrecondition
from kvstore_server.limits import Name
from kvstore_server.storage.keys import NUMBER_DIGITS, POSITION_MAX
from kvstore_server.storage.versions import check_readable

FORMAT = "kvstore.meta"
VERSION = 2
"""The newest `min_reader` that this code reads; checkpoints have it, all other records the first."""
RECORD_BYTES_MAX = 1 << 20
ANCESTORS_MAX = 64
MERGED_MAX = 2048

Position = Annotated[int, Field(ge=0, le=POSITION_MAX)]
Generation = Annotated[str, Field(pattern=f"^[0-9]{{{NUMBER_DIGITS}}}$")]
Seconds = Annotated[float, Field(gt=0)]
Hex256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Ancestor(Frozen, frozen=True):
    """Positions below `end`, from the ancestor before it on, are those of this generation of this session."""

    session: Name
    generation: Generation
    end: Position


Level = Annotated[int, Field(ge=0, le=63)]
Floor = tuple[Level, Level]
"""The finest level of keys and of values that is there, 0 if all bits are."""


class MergedRange(Frozen, frozen=True):
    """Appends [start, end) of a generation lie in its merged object `name`, whose header has this digest."""

    start: Position
    end: Position
    name: Annotated[str, Field(pattern=r"^[0-9]{12}-[0-9A-Za-z]{1,64}$")]
    digest: Hex256
    stored_bytes: Annotated[int, Field(ge=0)]
    floor: Floor = (0, 0)
    """What the object was cut to."""


class _Record(Frozen, frozen=True):
    format: Literal["kvstore.meta"] = FORMAT
    version: int = 1
    min_reader: Literal[1, 2] = 1
    tenant: str
    session: str
    seq: Position
    writer: str
    """A nonce: a writer that finds its record in place knows its own, if the store had lost the answer."""
    created_unix_seconds: float


class Create(_Record, frozen=True):
    """Starts a generation, which is named after `seq`."""

    type: Literal["create"] = "create"
    spec: CodecSpec
    shape: ModelShape
    ttl_seconds: Seconds | None
    pinned: bool
    ancestors: Annotated[tuple[Ancestor, ...], Field(max_length=ANCESTORS_MAX)]


class Attributes(_Record, frozen=True):
    """Replaces what may change of a living generation."""

    type: Literal["attributes"] = "attributes"
    generation: Generation
    ttl_seconds: Seconds | None
    pinned: bool


class Delete(_Record, frozen=True):
    """Ends a generation."""

    type: Literal["delete"] = "delete"
    generation: Generation


class Expire(_Record, frozen=True):
    """Ends a generation that nobody used: those who name it may still read it for a while."""

    type: Literal["expire"] = "expire"
    generation: Generation


class Checkpoint(_Record, frozen=True):
    """Where the appends of a living generation lie: in these objects, and under their log names between the ranges.

    Has the attributes too, so that no record between it and the generation's first need be read.
    """

    version: int = VERSION
    min_reader: Literal[2] = VERSION
    type: Literal["checkpoint"] = "checkpoint"
    generation: Generation
    ttl_seconds: Seconds | None
    pinned: bool
    merged: Annotated[tuple[MergedRange, ...], Field(min_length=1, max_length=MERGED_MAX)]
    floor: Floor = (0, 0)
    """What every answer is cut to from now on, whether or not the objects are yet."""

    @model_validator(mode="after")
    def _in_order(self) -> "Checkpoint":
        borders = [border for each in self.merged for border in (each.start, each.end)]
        if borders != sorted(borders) or any(each.start == each.end for each in self.merged):
            raise ValueError("merged ranges are empty or overlap")
        return self


Record = Create | Attributes | Delete | Expire | Checkpoint
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="type")])


def write_record(record: Record) -> bytes:
    fields = record.model_dump(mode="json")
    return _canonical({**fields, "crc32c": crc32c(_canonical(fields))})


def read_record(data: bytes | memoryview, tenant: str, session: str, seq: int) -> Record:
    """The record `seq` of that name.

    DataLoss if it is damaged or another record; FailedPrecondition if a newer version wrote it.
    """
    try:
        fields = _checked_fields(data)
        if [fields.get(name) for name in ("format", "tenant", "session", "seq")] != [FORMAT, tenant, session, seq]:
            raise ValueError("another record")
    except (ValueError, RecursionError) as error:
        text = f"session {session}, meta record {seq} is damaged"
        raise DataLoss("META_DAMAGED", text, session=session, seq=seq) from error
    check_readable(fields.get("min_reader"), VERSION, "record")
    try:
        return _RECORD.validate_python(fields)
    except ValidationError as error:
        text = f"session {session}, meta record {seq} is of a kind that this version does not know"
        raise FailedPrecondition("FORMAT_VERSION", text, session=session, seq=seq) from error


def _checked_fields(data: bytes | memoryview) -> dict[str, object]:
    """The fields without their checksum. Bytes must be canonical, so that no change can hide in spelling."""
    if len(data) > RECORD_BYTES_MAX:
        raise ValueError(f"{len(data)} bytes are no record")
    fields = json.loads(bytes(data))
    if not isinstance(fields, dict) or _canonical(fields) != bytes(data):
        raise ValueError("not canonical")
    if fields.pop("crc32c", None) != crc32c(_canonical(fields)):
        raise ValueError("checksum")
    return fields


def _canonical(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
