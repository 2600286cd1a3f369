import pytest
import torch

from kvstore_client import Internal, InvalidArgument
from kvstore_client.tensors import FROM_PROTO, data_of, from_proto, to_proto
from kvstore_proto.v1 import kvstore_pb2 as pb

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 32), (5,), (0, 4), ()])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = (torch.randn(shape) * 100).to(dtype)
    back = from_proto(to_proto(tensor), dtype=dtype, shape=shape)
    assert torch.equal(back, tensor)
    assert back.dtype == dtype


def test_nan_infinity_and_negative_zero_keep_their_bits():
    tensor = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=torch.bfloat16)
    assert to_proto(from_proto(to_proto(tensor))) == to_proto(tensor)


def test_the_bytes_are_little_endian_in_row_order_even_of_a_view():
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int64).t()
    assert to_proto(tensor).data == b"".join(n.to_bytes(8, "little") for n in (1, 3, 2, 4))


def test_a_contiguous_tensor_is_not_copied():
    tensor = torch.zeros(4, 8)
    data = data_of(tensor[1:3])
    tensor[1, 0] = 1
    assert bytes(data[:4]) == b"\0\0\x80\x3f"


def test_what_comes_back_has_its_own_writable_memory():
    message = to_proto(torch.zeros(4))
    tensor = from_proto(message)
    tensor += 1
    assert from_proto(message).sum() == 0


def test_a_tensor_with_a_gradient_can_be_sent():
    assert to_proto(torch.ones(2, requires_grad=True)).shape == [2]


def test_a_dtype_the_service_lacks_is_refused_by_the_field_s_name():
    with pytest.raises(InvalidArgument, match=r"q: dtype torch\.float64"):
        to_proto(torch.zeros(1, dtype=torch.float64), "q")


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2], data=bytes(7)), "7 bytes"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**62], data=bytes(8)), "8 bytes"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT16, shape=[2], data=bytes(4)), "dtype 2"),
        (pb.Tensor(shape=[2], data=bytes(8)), "dtype 0"),
        (pb.Tensor(dtype=77, shape=[2], data=bytes(8)), "dtype 77"),  # type: ignore[arg-type]
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[3], data=bytes(12)), r"shape \[3\]"),
    ],
)
def test_a_reply_that_lies_about_itself_is_an_internal_error(message: pb.Tensor, wrong: str):
    with pytest.raises(Internal, match=wrong):
        from_proto(message, dtype=torch.float32, shape=None if message.shape == [2**62] else (2,))


def test_every_dtype_of_the_protocol_is_known():
    assert set(FROM_PROTO) == set(pb.Dtype.values()) - {pb.DTYPE_UNSPECIFIED}
