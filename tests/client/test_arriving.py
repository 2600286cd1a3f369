import pytest
import torch

from kvstore_client import Internal
from kvstore_client.arriving import Rows
from kvstore_client.tensors import data_of

ROWS = torch.randn(9, 2, 4).half()


def put(rows: Rows, start: int, tensor: torch.Tensor) -> None:
    rows.place(start, tensor.shape, tensor.dtype, data_of(tensor))()


def test_rows_lie_end_to_end_in_the_memory_that_was_given() -> None:
    memory = torch.empty(9, 2, 4, dtype=torch.float16)
    rows = Rows(100, memory, 9)
    copies = [rows.place(100 + a, ROWS[a:b].shape, ROWS.dtype, data_of(ROWS[a:b])) for a, b in ((0, 4), (4, 5), (5, 9))]
    for copy in copies:
        copy()
    assert torch.equal(memory, ROWS)
    assert rows.tensor().data_ptr() == memory.data_ptr()


def test_memory_grows_to_the_most_there_may_be_and_keeps_what_has_come() -> None:
    rows = Rows(0, torch.empty(4, 2, 4, dtype=torch.float16), 9)
    put(rows, 0, ROWS[:4])
    assert rows.tensor().shape == (4, 2, 4)
    put(rows, 4, ROWS[4:])
    assert torch.equal(rows.tensor(), ROWS)


@pytest.mark.parametrize(
    ("start", "tensor"),
    [
        (2, ROWS[2:]),
        (4, ROWS[4:]),
        (3, ROWS[3:].float()),
        (3, ROWS[3:, :1]),
        (3, torch.cat([ROWS[3:], ROWS[:1]])),
    ],
)
def test_rows_that_do_not_belong_there_are_refused(start: int, tensor: torch.Tensor) -> None:
    rows = Rows(0, torch.empty(9, 2, 4, dtype=torch.float16), 9)
    put(rows, 0, ROWS[:3])
    with pytest.raises(Internal):
        put(rows, start, tensor)
    assert torch.equal(rows.tensor(), ROWS[:3])


def test_data_that_is_not_of_its_shape_is_refused() -> None:
    rows = Rows(0, torch.empty(9, 2, 4, dtype=torch.float16), 9)
    with pytest.raises(Internal, match="15 bytes"):
        rows.place(0, (1, 2, 4), torch.float16, memoryview(bytes(15)))


def test_rows_without_a_width_are_counted() -> None:
    rows = Rows(0, torch.empty(9, 0, dtype=torch.int32), 9)
    put(rows, 0, torch.empty(9, 0, dtype=torch.int32))
    assert rows.tensor().shape == (9, 0)
