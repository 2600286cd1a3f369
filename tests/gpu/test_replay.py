"""Recordings on a device that other threads use meanwhile."""

from threading import Thread

import pytest
import torch
from torch import Tensor

from kvstore_kernels.cuda.replay import RECORD_AFTER, Recorder
from tests.gpu import inputs
from tests.gpu.inputs import DEVICE

inputs.require_device()
pytestmark = pytest.mark.gpu


def test_pinned_memory_may_be_given_back_while_an_answer_is_recorded() -> None:
    """As an event loop does with the copies of answers that it has sent."""
    stream = torch.cuda.Stream(DEVICE)
    recorder, q, kept = Recorder(stream), torch.ones(2, 4, 8), {}
    host = [torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)]
    recorded = list[bool]()

    def attend(on_device: Tensor) -> tuple[Tensor, Tensor, None]:
        recorded.append(torch.cuda.is_current_stream_capturing())
        if recorded[-1]:
            thread = Thread(target=host.clear)
            thread.start()
            thread.join(10)
        return on_device + 1, on_device.sum(2), None

    with torch.cuda.stream(stream):
        host[0].copy_(torch.zeros(1 << 20, dtype=torch.uint8, device=DEVICE), non_blocking=True)
        answers = [recorder.run(kept, "key", q, attend) for _ in range(RECORD_AFTER + 1)]
    assert any(recorded)
    torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)  # asks whether what was given back is free
    assert answers[-1] is not None
    out, lse, _ = answers[-1]()
    assert torch.equal(out, q + 1)
    assert torch.equal(lse, q.sum(2))
