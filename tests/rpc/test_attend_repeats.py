"""Steps that are known by their bytes are read as protobuf reads them."""

from typing import Any

import pytest

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import varint
from kvstore_server.rpc.attend_repeats import Repeats


def step(request_id: int, data: bytes = bytes(64), **more: Any) -> bytes:
    q = pb.Tensor(dtype=pb.DTYPE_FLOAT16, shape=[1, 2, 16], data=data)
    made = {"timeout_ms": 500, "items": [pb.AttendStep.Item(handle=1, end=300, rows=1)], "q": q, **more}
    return pb.AttendRequest(step=pb.AttendStep(request_id=request_id, **made)).SerializeToString()


@pytest.mark.parametrize("more", [{}, {"layer": 7, "debias": 0.0, "precision": pb.Precision(keys_level=1)}])
def test_a_step_that_differs_in_its_number_and_q_is_found_with_both(more: dict[str, Any]) -> None:
    repeats = Repeats[str]()
    assert repeats.find(step(1, **more)) is None
    repeats.keep(step(1, **more), "kept")
    for request_id in (1, 2, 300, 2**64 - 1):
        data = bytes(byte % 256 for byte in range(request_id % 99, request_id % 99 + 64))
        assert repeats.find(step(request_id, data, **more)) == (request_id, data, "kept")
    repeats.clear()
    assert repeats.find(step(1, **more)) is None


def test_one_that_asks_something_else_is_not_found() -> None:
    repeats = Repeats[str]()
    repeats.keep(step(1), "kept")
    others = [step(2, layer=1), step(2, timeout_ms=501), step(2, bytes(32)), step(2, debias=0.5), step(2)[:-1]]
    others += [step(2) + b"\x00", step(0), step(2) + step(3), b"", b"\x12", pb.AttendRequest().SerializeToString()]
    assert [repeats.find(other) for other in others] == [None] * len(others)


def test_several_kinds_are_kept_at_a_time() -> None:
    repeats = Repeats[int]()
    for layer in range(3):
        repeats.keep(step(1, layer=layer), layer)
    found = [repeats.find(step(9, layer=layer)) for layer in range(3)]
    assert [each and each[2] for each in found] == [0, 1, 2]


def test_what_protobuf_would_write_otherwise_is_not_kept() -> None:
    """So that nothing can follow q that changes it."""
    second_q = pb.AttendStep(q=pb.Tensor(data=b"other")).SerializeToString()
    body = step(1)[2:] + second_q
    unusual = step(1)[:1] + varint(len(body)) + body
    assert pb.AttendRequest.FromString(unusual).step.q.data == b"other"
    unknown = step(1)[2:] + b"\xf8\x07\x01"
    repeats = Repeats[str]()
    for message in (unusual, step(1)[:1] + varint(len(unknown)) + unknown):
        repeats.keep(message, "kept")
        assert repeats.find(message) is None
