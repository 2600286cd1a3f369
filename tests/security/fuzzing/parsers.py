"""What reads bytes that nobody vouches for: each parser, its only errors, a seal, and a bug that can be planted in it.

A seal makes right what would hide the rest: a checksum that holds is no reason to trust what is under it.
"""

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from crc32c import crc32c
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from kvstore_codecs import artifact, resolve
from kvstore_codecs.spec import KINDS
from kvstore_proto import cut
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import read_varint
from kvstore_server.errors import DataLoss, FailedPrecondition, InvalidArgument
from kvstore_server.identity import api_keys
from kvstore_server.metadata.index import Notice, PrefixEntry
from kvstore_server.metadata.redis import RedisIndex
from kvstore_server.rpc import append_messages, attend_repeats, convert
from kvstore_server.storage import container, meta, segment, segment_header

from ...storage.inputs import SHAPE, commit_log, created, log_key
from ...storage.memory_store import MemoryStore

IDENTITY = segment_header.Identity("default", "a", "000000000000", 0)
KEY_ID = "0" * 16
TIMES_INPUT_MAX = 4
FIXED_BYTES = 256 << 10
"""For what does not depend on the input: errors with their tracebacks, validators' contexts."""
SECONDS_MAX = 2.0
STEP = pb.AttendRequest(
    step=pb.AttendStep(
        request_id=300,
        timeout_ms=500,
        items=[pb.AttendStep.Item(handle=1, end=9, rows=1)],
        q=pb.Tensor(dtype=pb.DTYPE_FLOAT16, shape=[1, 1, 16], data=bytes(range(32))),
        head_offset=1,
    )
)
_INDEX = RedisIndex("redis://127.0.0.1:1/0")


class Violation(AssertionError):
    """A parser took too much memory or time."""


@dataclass(frozen=True)
class Parser:
    """`planted` is (object, attribute, replacement): the same parser with a check taken out."""

    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    planted: tuple[object, str, Any]
    seal: Callable[[bytes], bytes] = bytes


def examine(parser: Parser, data: bytes) -> None:
    """Raises what the parser must not: any error but its own, or Violation. tracemalloc must be on."""
    sealed = parser.seal(data)
    tracemalloc.reset_peak()
    before, began = tracemalloc.get_traced_memory()[0], perf_counter()
    with suppress(*parser.errors):
        parser.parse(sealed)
    seconds, taken = perf_counter() - began, tracemalloc.get_traced_memory()[1] - before
    if taken > TIMES_INPUT_MAX * len(sealed) + FIXED_BYTES:
        raise Violation(f"{taken} bytes were allocated for {len(sealed)} bytes of input")
    if seconds > SECONDS_MAX:
        raise Violation(f"{len(sealed)} bytes of input took {seconds:.1f} s")


def sealed_object(data: bytes) -> bytes:
    """An object whose header is padded and has the right checksum."""
    if len(data) < container.PREFIX_BYTES:
        return data
    (length,) = struct.unpack_from("<Q", data)
    end = container.PREFIX_BYTES + length
    if end > len(data):
        return data
    text = data[container.PREFIX_BYTES : end].rstrip(b" ")
    text += b" " * (-(container.PREFIX_BYTES + len(text)) % container.ALIGNMENT_BYTES)
    head = struct.pack("<Q", len(text)) + text
    return head + struct.pack("<I", crc32c(head)) + data[end + container.HEADER_CRC_BYTES :]


def sealed_record(data: bytes) -> bytes:
    """Canonical JSON with the right checksum, if it is an object at all."""
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict):
            return data
        fields.pop("crc32c", None)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        fields["crc32c"] = crc32c(text)
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):
        return data


def in_log(data: bytes) -> object:
    """What a session makes of these bytes as its first record, after an R, or as its first append."""
    store = MemoryStore()
    log = commit_log(store)
    created(log)
    record = next(iter(store.objects))
    store.objects[record if data[:1] == b"R" else log_key(0)] = data[1:]
    state = log.load("a")
    return [log.inspect(state, entry) for entry in log.appends(state)] if state else None


def sealed_in_log(data: bytes) -> bytes:
    return data[:1] + (sealed_record if data[:1] == b"R" else sealed_object)(data[1:])


def index_value(data: bytes) -> object:
    """The first byte says what it is read as. Of an entry, the score of its last use follows after a newline."""
    kind, value = data[:1], data[1:]
    if kind == b"P":
        return _INDEX._prefix(value)  # pyright: ignore[reportPrivateUsage]
    if kind == b"R":
        return _INDEX._replica(value)  # pyright: ignore[reportPrivateUsage]
    if kind == b"N":
        with suppress(ValidationError):  # as its reader does, in line
            return Notice.model_validate_json(value)
        return None
    value, _, used = value.partition(b"\n")
    return _INDEX._entry("default", b"a", value, used)  # pyright: ignore[reportPrivateUsage]


def append_message(data: bytes) -> None:
    """As protobuf would read it, or not at all."""
    found = append_messages.parse_append(data)
    whole = pb.AppendRequest.FromString(data)
    if isinstance(found, append_messages.CutFrame):
        found.head.data = bytes(found.data)
        found = pb.AppendRequest(frame=found.head)
    assert found == whole, "two readings of one message"


def attend_message(data: bytes) -> None:
    """As protobuf would read it, with all but its number and q's data as in what was kept, or not at all."""
    repeats = attend_repeats.Repeats[bool]()
    repeats.keep(STEP.SerializeToString(), True)
    if (found := repeats.find(data)) is not None:
        like = pb.AttendRequest.FromString(STEP.SerializeToString())
        like.step.request_id, like.step.q.data = found[:2]
        assert like == pb.AttendRequest.FromString(data), "two readings of one message"


def codec_json(data: bytes) -> object:
    """As CreateSession checks it and appends use it. protobuf has seen to it that the text is UTF-8."""
    spec = convert.spec_from(data.decode("utf-8", "replace"))
    resolve.check_spec(spec, SHAPE)
    return [spec.of_layers(kind, SHAPE.layers) for kind in KINDS]


def _endless_varint(message: bytes, at: int) -> tuple[int, int]:
    value, place = 0, 0
    while message[at + place] & 0x80:
        value |= (message[at + place] & 0x7F) << 7 * place
        place += 1
    return value | message[at + place] << 7 * place, at + place + 1


def _trusting_begin(message: bytes) -> tuple[int, int] | None:
    """Whatever size the step says it has."""
    if len(message) < 32:
        return None
    _, begin = read_varint(message, 1)
    return read_varint(message, begin + 1)


def _header_beyond_the_end(head: memoryview) -> Any:
    struct.unpack_from("<I", head, container.data_offset(head))
    return container.parse_header(head)


def _lenient_version(min_reader: Any, newest: int, what: str) -> None:
    if int(min_reader) > newest:
        raise FailedPrecondition("FORMAT_VERSION", what)


def _trusting_header(view: memoryview) -> Any:
    if len(view) >= container.PREFIX_BYTES:
        bytearray(struct.unpack_from("<Q", view)[0] & 0x7FFF_FFFF)
    return _READ_HEADER(view)


_READ_HEADER = artifact.read_header
_OBJECT = DataLoss, FailedPrecondition
PARSERS: dict[str, Parser] = {
    "object": Parser(
        lambda data: segment.read_segment(data, IDENTITY), _OBJECT, (segment, "parse_header", _header_beyond_the_end)
    ),
    "object, sealed": Parser(
        lambda data: segment.read_segment(data, IDENTITY),
        _OBJECT,
        (segment_header, "check_readable", _lenient_version),
        sealed_object,
    ),
    "record": Parser(
        lambda data: meta.read_record(data, "default", "a", 0),
        _OBJECT,
        (meta, "check_readable", _lenient_version),
        sealed_record,
    ),
    "commit log": Parser(in_log, _OBJECT, (segment, "parse_header", _header_beyond_the_end), sealed_in_log),
    "projection": Parser(artifact.read_projection, (ValueError,), (artifact, "read_header", _trusting_header)),
    "index value": Parser(
        index_value, (), (RedisIndex, "_prefix", lambda _, value: PrefixEntry(**json.loads(value or b"{}")))
    ),
    "API key record": Parser(
        lambda data: api_keys.read_key_record(data, KEY_ID),
        (ValueError,),
        (
            api_keys.KeyRecord,
            "model_validate_json",
            lambda data: api_keys.KeyRecord.model_construct(**json.loads(data)),
        ),
    ),
    "Append message": Parser(append_message, (DecodeError,), (cut, "read_varint", _endless_varint)),
    "Attend message": Parser(attend_message, (), (attend_repeats, "_begun", _trusting_begin)),
    "codec": Parser(codec_json, (InvalidArgument, ValueError), (resolve, "check_spec", lambda spec, shape: None)),
}
