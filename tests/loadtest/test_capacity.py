import pytest

from kvstore_client.loadtest.capacity import highest_rate


@pytest.mark.parametrize("capacity", [3.0, 100.0, 777.0, 9000.0])
def test_the_highest_rate_is_found_from_either_side(capacity: float) -> None:
    tried: list[float] = []

    def keeps(rate: float) -> bool:
        tried.append(rate)
        return rate <= capacity

    found = highest_rate(keeps, 50.0)
    assert 0.85 * capacity <= found <= capacity
    assert found in tried


def test_a_server_that_never_keeps_its_bounds_has_no_capacity() -> None:
    assert highest_rate(lambda _: False, 50.0) == 0
