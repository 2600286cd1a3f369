from collections.abc import Iterator

import pytest
import torch

from kvstore_kernels.backend import Backend, ReferenceBackend, cpu_backend


@pytest.fixture(params=["reference", "compiled"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Both implementations of the CPU's ops."""
    if request.param == "reference":
        return ReferenceBackend()
    pytest.importorskip("numba")
    return cpu_backend()


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of small products cost more than they bring, the more so where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
