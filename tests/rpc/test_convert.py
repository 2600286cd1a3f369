import pytest
import torch

from kvstore_client.tensors import to_proto
from kvstore_server.errors import InvalidArgument
from kvstore_server.rpc.convert import tensor_from


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [2, 1000], ids=["few rows", "many"])
def test_the_largest_numbers_pass_and_what_is_not_finite_does_not(dtype: torch.dtype, heads: int) -> None:
    q = torch.randn(1, heads, 64).to(dtype)
    most = torch.finfo(dtype).max
    q[0, 0, :3] = torch.tensor([most, -most, most / 2])
    assert torch.equal(tensor_from(to_proto(q), "q", dims=3), q)
    for bad in (torch.nan, torch.inf, -torch.inf):
        q[0, -1, -1] = bad
        with pytest.raises(InvalidArgument, match="NaN or Inf"):
            tensor_from(to_proto(q), "q", dims=3)
