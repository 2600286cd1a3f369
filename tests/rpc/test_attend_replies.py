"""The bytes of an answer, and what protobuf reads in them."""

import pytest
import torch

from kvstore_client.tensors import from_proto
from kvstore_kernels.host import HostArray
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.rpc.attend_replies import encode_attended
from kvstore_server.rpc.convert import tensor_to
from kvstore_server.sessions.model import AttendAnswer, Fidelity, Precision


def answer(rows: int, dtype: torch.dtype, error: float, length: int = 300) -> AttendAnswer:
    out, lse = HostArray.of(torch.randn(rows, 4, 8).to(dtype)), HostArray.of(torch.randn(rows, 4))
    fidelity = Fidelity("rotated", "f" * 64, Precision(1, 2), False, 7, error)
    return AttendAnswer(out, lse, "01", length, fidelity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("request_id", [0, 1, 300, 2**64 - 1])
@pytest.mark.parametrize("base", [pb.LSE_BASE_UNSPECIFIED, pb.LSE_BASE_E, pb.LSE_BASE_2])
def test_an_answer_is_what_protobuf_writes(dtype: torch.dtype, request_id: int, base: pb.LseBase.ValueType) -> None:
    answers = [answer(2, dtype, 0.25), answer(1, dtype, 1e-300, length=0)]
    lse = torch.cat([each.lse.tensor() for each in answers]) * (1.4426950408889634 if base == pb.LSE_BASE_2 else 1)
    items = [
        pb.AttendResult.Item(
            generation=each.generation,
            length=each.length,
            fidelity=pb.Fidelity(
                codec="rotated",
                codec_fingerprint="f" * 64,
                precision=pb.Precision(keys_level=1, values_level=2),
                score_stderr=each.fidelity.score_stderr,
                positions_beyond=7,
            ),
        )
        for each in answers
    ]
    result = pb.AttendResult(
        out=tensor_to(torch.cat([each.out.tensor() for each in answers])),
        lse=tensor_to(lse),
        lse_base=base or pb.LSE_BASE_E,
        lse_layout=pb.LSE_LAYOUT_TOKEN_MAJOR,
        items=items,
    )
    wanted = pb.AttendResponse(request_id=request_id, result=result)
    assert encode_attended(request_id, answers, base) == wanted.SerializeToString()


def test_an_error_of_nothing_is_read_as_0() -> None:
    found = pb.AttendResponse.FromString(encode_attended(1, [answer(1, torch.float32, 0.0)], pb.LSE_BASE_E))
    assert found.result.items[0].fidelity.score_stderr == 0
    assert from_proto(found.result.out).shape == (1, 4, 8)
