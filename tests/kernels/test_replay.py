"""Recordings without a device: a graph that only copies stands for one that was captured."""

from functools import partial
from typing import Any, cast

import numpy as np
import torch

from kvstore_kernels.cuda.replay import Pinned, Recording
from kvstore_kernels.host import HostArray


class CopyingGraph:
    """Answers q + 1 and the sums of q, as a replay does: into memory that the next replay overwrites."""

    recording: Recording

    def replay(self) -> None:
        (q,), (out, lse) = self.recording.q.tensors, self.recording.answer.tensors
        out.copy_(q + 1)
        lse.copy_(q.float().sum(2))


class Event:
    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def recording(rows: int, dtype: torch.dtype) -> Recording:
    graph, q, lse = CopyingGraph(), torch.zeros(rows, 2, 4, dtype=dtype), torch.empty(rows, 2)
    pinned, answer = (Pinned(like, partial(np.zeros, dtype=np.uint8)) for like in ([q], [q, lse]))
    made = Recording(graph.replay, cast(Any, Event()), cast(Any, None), pinned, answer)
    graph.recording = made
    return made


def test_an_answer_outlives_the_replays_after_it():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        made = recording(4, dtype)
        asked = [torch.randn(rows, 2, 4).to(dtype) for rows in (3, 4, 1)]
        answers = [made.replay([HostArray.of(q)], len(q)) for q in asked]
        assert made.asked is answers[-1], "the others were copied out when their memory was needed"
        for q, answer in zip(asked, answers, strict=True):
            out, lse, variances = answer()
            assert torch.equal(out, q + 1)
            assert torch.equal(lse, q.float().sum(2))
            assert variances is None
        assert made.asked is None
