from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.wire import Frame, encode_append
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
