"""What is cut by hand must be what protobuf reads."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.rpc.append_messages import CutFrame, parse_append

FRAMES = st.builds(
    pb.AppendFrame,
    layer=st.integers(0, 2**32 - 1),
    kind=st.sampled_from([0, 1, 2, 77]),
    part=st.sampled_from([0, 1, 3]),
    token_offset=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 300),
    heads=st.integers(0, 300),
    data=st.binary(max_size=300),
)


def whole(parsed: pb.AppendRequest | CutFrame) -> pb.AppendRequest:
    if isinstance(parsed, pb.AppendRequest):
        return parsed
    assert not parsed.head.data
    frame = pb.AppendFrame()
    frame.CopyFrom(parsed.head)
    frame.data = bytes(parsed.data)
    return pb.AppendRequest(frame=frame)


@given(FRAMES)
def test_a_frame_is_cut_where_its_data_begins(frame: pb.AppendFrame):
    message = pb.AppendRequest(frame=frame)
    parsed = parse_append(message.SerializeToString())
    assert isinstance(parsed, CutFrame) == bool(frame.data)
    assert whole(parsed) == message


@given(FRAMES, st.data())
def test_bytes_that_protobuf_refuses_are_refused_and_others_read_alike(frame: pb.AppendFrame, data: st.DataObject):
    message = bytearray(pb.AppendRequest(frame=frame).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        if message:
            message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    message = bytes(message[: data.draw(st.integers(0, len(message)))])
    try:
        expected = pb.AppendRequest.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse_append(message)
    else:
        assert whole(parse_append(message)) == expected


def test_fields_after_the_data_and_repeated_data_are_read_as_protobuf_reads_them():
    first, last = (pb.AppendFrame(data=data).SerializeToString() for data in (b"first", b"last"))
    for body in (first + last, last + pb.AppendFrame(tokens=7).SerializeToString()):
        message = bytes([0x12, len(body)]) + body
        assert whole(parse_append(message)) == pb.AppendRequest.FromString(message)
    header = pb.AppendRequest(header=pb.AppendHeader(session="a"))
    assert parse_append(header.SerializeToString()) == header
