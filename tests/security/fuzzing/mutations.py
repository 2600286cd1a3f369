"""Messages, bytes and streams that are almost right. Everything comes from the `Random` that is given."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

INTEGERS = (0, 1, 2, 3, 255, 256, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e-40, 1.7e308, -1.0, 0.5, 2.0)
TEXTS = ("", ".", "..", "../../etc/passwd", "_keys", "a/b", "a\0b", "ä", "\u202e", "a" * 128, "a" * 129, "%s%n", "7")
JSON_VALUES = (None, True, -1, 0, 0.5, 1e308, 10**30, "", "session", "projection:" + "0" * 64, [], {}, [[]], [0] * 300)
UNKNOWN_FIELDS = (
    b"\xf8\x7f\x01",
    b"\xf9\x7f" + b"x" * 8,
    b"\xfa\x7f\x03abc",
    b"\xfb\x7f\xfc\x7f",
    b"\xfd\x7f" + b"x" * 4,
)
"""Field 2047 with each wire type; the fourth is an empty group."""
MANY = 3_000
BIG_BYTES = 5 << 20


def changed_message(message: Message, chance: Random) -> Message:
    """A copy of which one to four fields, at any depth, are extreme, absent or many."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(chance.randint(1, 4)):
        node: Any = chance.choice(_nodes(copy))
        if fields := node.DESCRIPTOR.fields:
            _change(node, chance.choice(fields), chance)
    return copy


def _nodes(message: Any) -> list[Any]:
    """The message and every one within it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == Field.TYPE_MESSAGE:
            for each in value if field.is_repeated else [value]:
                found += _nodes(each)
    return found


def _change(node: Any, field: Any, chance: Random) -> None:
    if chance.random() < 0.15:
        node.ClearField(field.name)
    elif field.is_repeated:
        _change_repeated(getattr(node, field.name), field, chance)
    elif field.type == Field.TYPE_MESSAGE:
        getattr(node, field.name).SetInParent()
    else:
        setattr(node, field.name, _scalar(field, getattr(node, field.name), chance))


def _change_repeated(values: Any, field: Any, chance: Random) -> None:
    if field.type == Field.TYPE_MESSAGE:
        first = values[0] if values else None
        for _ in range(chance.choice([1, 2, 300])):
            values.add().CopyFrom(first) if first else values.add()
        return
    kept = list(values)
    del values[:]
    if chance.random() < 0.3:
        chance.shuffle(kept)
    elif chance.random() < 0.5:
        kept = kept[: chance.randint(0, len(kept))]
    first = kept[0] if kept else b"" if field.type == Field.TYPE_BYTES else 0
    more = _scalar(field, first, chance)
    most = MANY if field.type != Field.TYPE_BYTES else 1 + BIG_BYTES // max(1, len(more))
    values.extend([*kept, *[more] * min(most, chance.choice([0, 1, 2, MANY]))])


def _scalar(field: Any, value: Any, chance: Random) -> Any:
    kind = field.cpp_type
    if kind == Field.CPPTYPE_BOOL:
        return not value
    if kind == Field.CPPTYPE_ENUM:
        return chance.choice([*range(7), 99, 2**31 - 1, -1])
    if kind == Field.CPPTYPE_DOUBLE:
        return chance.choice(NUMBERS)
    if kind in (Field.CPPTYPE_UINT32, Field.CPPTYPE_UINT64):
        most = 2**32 - 1 if kind == Field.CPPTYPE_UINT32 else 2**64 - 1
        return chance.choice([n for n in (*INTEGERS, value + 1, value - 1, 2 * value) if 0 <= n <= most])
    if field.type == Field.TYPE_BYTES:
        return _changed_data(bytes(value), chance)
    assert kind == Field.CPPTYPE_STRING, f"the protocol has a new type of field: {field.full_name}"
    if field.name.endswith("_json") and value and chance.random() < 0.8:
        with suppress(ValueError, RecursionError):  # a change before this one may have left no JSON
            return json.dumps(_changed_json(json.loads(value), chance))
    return chance.choice([*TEXTS, value + "x", value[1:], "[" * 50_000, "x" * 70_000])


def _changed_json(value: Any, chance: Random) -> Any:
    """With one part replaced, dropped or added."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        if chance.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: _changed_json(value[key], chance)}
    return chance.choice(JSON_VALUES)


def _changed_data(data: bytes, chance: Random) -> bytes:
    """Of a tensor mostly: no numbers, other sizes, other bits."""
    choice = chance.randrange(8)
    if choice == 0:
        return b"\xff" * len(data)
    if choice == 1:
        return data[: chance.randint(0, len(data))]
    if choice == 2:
        return data + data
    if choice == 3:
        return data + b"\0"
    if choice == 4:
        return chance.randbytes(len(data) or 7)
    if choice == 5 and chance.random() < 0.05:
        return bytes(BIG_BYTES)
    return data[:-4] + chance.choice([b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0"])


def changed_bytes(data: bytes, chance: Random) -> bytes:
    """One to four edits that know nothing of the format, or an unknown field."""
    for _ in range(chance.randint(1, 4)):
        data = chance.choice(EDITS)(data, chance)
    return data


def _flip(data: bytes, chance: Random) -> bytes:
    if not data:
        return chance.randbytes(3)
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, chance: Random) -> bytes:
    first, last = sorted(chance.randint(0, len(data)) for _ in range(2))
    return chance.choice([data[:first], data[first:], data[:first] + data[last:], data[:last] + data[first:]])


def _insert(data: bytes, chance: Random) -> bytes:
    at = chance.randint(0, min(len(data), 64))
    piece = chance.choice([chance.randbytes(chance.randint(1, 12)), b"\xff" * 10, b"\x80" * 11, b"\x0b" * 4_000])
    return data[:at] + piece + data[at:]


def _unknown(data: bytes, chance: Random) -> bytes:
    return data + chance.choice(UNKNOWN_FIELDS) * chance.choice([1, 1, MANY])


def _garbage(data: bytes, chance: Random) -> bytes:
    return chance.randbytes(chance.randint(0, 200))


EDITS: tuple[Callable[[bytes, Random], bytes], ...] = (_flip, _flip, _cut, _insert, _unknown, _garbage)


def changed_stream(messages: Sequence[bytes], strangers: Sequence[bytes], chance: Random) -> list[bytes]:
    """In another order, with one left out, doubled, of another method or of no meaning in between, or too many."""
    changed = list(messages)
    at = chance.randint(0, len(changed))
    choice = chance.randrange(8)
    if choice == 0:
        chance.shuffle(changed)
    elif choice == 1:
        del changed[at - 1 : at]
    elif choice == 2:
        changed[at:at] = changed[:at]
    elif choice == 3:
        changed.insert(at, chance.choice(strangers))
    elif choice == 4:
        changed.insert(at, chance.randbytes(chance.randint(0, 40)))
    elif choice == 5:
        changed[at:at] = [b""] * chance.choice([1, 300])
    elif choice == 6:
        changed = changed[:at]
    else:
        changed += [changed[-1]] * 100
    return changed
