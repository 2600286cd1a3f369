"""The bytes of a part, and what protobuf reads in them."""

import pytest
import torch

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.rpc.convert import tensor_to
from kvstore_server.rpc.fetch_stream import encode_part
from kvstore_server.sessions.model import FetchPart

BEFORE = pb.FetchResponse(generation="01", length=2**40).SerializeToString()
TENSORS = [
    torch.randn(300, 2, 8).half(),
    torch.randn(3, 2, 8).bfloat16(),
    torch.randn(1, 2, 8),
    torch.randint(-(2**31), 2**31, (5, 8)).int()[1:4],
    torch.randn(4, 3, 2).transpose(0, 1),
    torch.arange(6).view(3, 2),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda each: f"{each.dtype} {[*each.shape]}")
@pytest.mark.parametrize("start", [0, 1, 2**40])
def test_a_part_is_what_protobuf_writes(tensor: torch.Tensor, start: int) -> None:
    wanted = pb.FetchResponse(
        generation="01",
        length=2**40,
        part=pb.FetchPart(
            layer=3, kind=pb.KIND_VALUES, part=pb.PART_WORDS, token_start=start, tensor=tensor_to(tensor)
        ),
    )
    assert encode_part(BEFORE, FetchPart(3, "values", "words", start, tensor)) == wanted.SerializeToString()


def test_a_part_without_data_has_its_shape() -> None:
    found = pb.FetchResponse.FromString(encode_part(BEFORE, FetchPart(0, "keys", "words", 7, torch.empty(5, 0).int())))
    assert (list(found.part.tensor.shape), found.part.tensor.data, found.part.token_start) == ([5, 0], b"", 7)
