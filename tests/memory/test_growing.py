import torch

from kvstore_server.memory.growing import GrowingRows


def test_views_stay_valid_while_rows_are_added() -> None:
    rows = GrowingRows((3,), torch.float32)
    written = torch.randn(2000, 3)
    views = []
    for start in range(0, 2000, 7):
        rows.extend(written[start : start + 7])
        views.append((rows.length, rows.between(0, rows.length)))
    assert rows.length == 2000
    assert all(torch.equal(view, written[:length]) for length, view in views)


def test_growth_is_amortised() -> None:
    rows = GrowingRows((1,), torch.int32)
    buffers = set()
    for _ in range(10_000):
        rows.extend(torch.zeros(1, 1, dtype=torch.int32))
        buffers.add(rows.between(0, 1).data_ptr())
    assert len(buffers) < 20


def test_rows_of_no_width_are_counted() -> None:
    rows = GrowingRows((0,), torch.int32)
    rows.extend(torch.empty(5, 0, dtype=torch.int32))
    assert rows.between(1, 4).shape == (3, 0)
