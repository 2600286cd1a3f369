from collections.abc import Iterator

import pytest
import torch

from kvstore_kernels.backend import Backend, cpu_backend


@pytest.fixture(scope="session")
def backend() -> Backend:
    return cpu_backend()


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of small products cost more than they bring, the more so where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
