import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.tensors import to_proto
from kvstore_client.wire import Frame, Part, decode_fetch, encode_append
from kvstore_proto.v1 import kvstore_pb2 as pb

UINT32 = st.integers(0, 2**32 - 1)
HEADS = st.builds(
    pb.AppendFrame,
    layer=UINT32,
    kind=st.sampled_from(pb.Kind.values()),
    part=st.sampled_from(pb.Part.values()),
    token_offset=UINT32,
    tokens=UINT32,
    head_offset=UINT32,
    heads=UINT32,
)


@given(HEADS, st.binary(max_size=300))
def test_a_frame_has_protobuf_s_own_bytes(head: pb.AppendFrame, data: bytes):
    whole = pb.AppendFrame()
    whole.CopyFrom(head)
    whole.data = data
    expected = pb.AppendRequest(frame=whole).SerializeToString()
    assert encode_append(Frame(head, memoryview(data))) == expected


def test_lengths_around_each_varint_size_are_right():
    for size in (0, 1, 127, 128, 16_383, 16_384, 2**21 - 1, 2**21):
        frame = Frame(pb.AppendFrame(layer=3, tokens=1), memoryview(bytes(size)))
        parsed = pb.AppendRequest.FromString(encode_append(frame))
        assert (parsed.frame.layer, len(parsed.frame.data)) == (3, size)


def test_a_header_goes_as_protobuf_writes_it():
    header = pb.AppendHeader(session="book", start=2**40, tokens=7)
    assert encode_append(header) == pb.AppendRequest(header=header).SerializeToString()


PARTS = st.builds(
    pb.FetchPart,
    layer=UINT32,
    kind=st.sampled_from(pb.Kind.values()),
    part=st.sampled_from(pb.Part.values()),
    token_start=st.integers(0, 2**64 - 1),
    tensor=st.builds(
        pb.Tensor,
        dtype=st.sampled_from(pb.Dtype.values()),
        shape=st.lists(st.integers(0, 2**40), max_size=3),
        data=st.binary(max_size=300),
    ),
)
FACTS = st.builds(pb.FetchResponse, generation=st.text(max_size=9), length=st.integers(0, 2**64 - 1))


@given(FACTS, PARTS)
def test_a_part_is_read_as_protobuf_reads_it(facts: pb.FetchResponse, part: pb.FetchPart):
    message = pb.FetchResponse(generation=facts.generation, length=facts.length, part=part)
    found = decode_fetch(message.SerializeToString())
    assert isinstance(found, Part)
    assert bytes(found.data) == part.tensor.data
    head, tensor = pb.FetchPart(), pb.Tensor()
    head.CopyFrom(found.head)
    tensor.CopyFrom(found.tensor)
    tensor.data = bytes(found.data)
    head.tensor.CopyFrom(tensor)
    assert head == part


@given(FACTS, PARTS, st.data())
def test_bytes_that_protobuf_refuses_are_no_reply(facts: pb.FetchResponse, part: pb.FetchPart, data: st.DataObject):
    message = pb.FetchResponse(generation=facts.generation, length=facts.length, part=part).SerializeToString()
    message = message[: data.draw(st.integers(0, len(message)))]
    try:
        pb.FetchResponse.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode_fetch(message)
    else:
        decode_fetch(message)


def test_the_data_of_a_part_is_not_copied():
    message = pb.FetchResponse(part=pb.FetchPart(tensor=to_proto(torch.zeros(3)))).SerializeToString()
    found = decode_fetch(message)
    assert isinstance(found, Part)
    assert found.data.obj is message


def test_a_header_is_a_header():
    header = pb.FetchHeader(token_start=3, token_end=7)
    assert decode_fetch(pb.FetchResponse(generation="1", header=header).SerializeToString()) == header
