"""Attention over rows that stay where they are, recorded once and replayed: one launch by the host, not one a kernel.

A recording reads the very addresses it was made with: those of the rows, with which it is kept (`kept`) and must go
when they move, and those of its own pinned memory, from which queries go to the device and to which answers come.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvstore_kernels.backend import State

RECORD_AFTER = 2
"""Runs of the same kind that are launched kernel by kernel first: not every row is asked for often."""
SLOTS = 2
"""Recordings of one kind: one may be asked while the answer of the other is on its way."""


class Answer:
    """Of one replay; copied out of the recording's memory by whoever asks first, or when that memory is needed."""

    def __init__(self, recording: "Recording", rows: int) -> None:
        self._recording, self._rows = recording, rows
        self._lock = threading.Lock()
        self._state: State | None = None

    def __call__(self) -> State:
        with self._lock:
            if self._state is None:
                recording, rows = self._recording, self._rows
                recording.done.synchronize()
                self._state = recording.out[:rows].clone(), recording.lse[:rows].clone()
                recording.asked = None
            return self._state


@dataclass
class Recording:
    """`q`, `out` and `lse` are pinned host memory."""

    graph: torch.cuda.CUDAGraph
    done: torch.cuda.Event
    q: Tensor
    out: Tensor
    lse: Tensor
    asked: Answer | None = None
    """What is still to be copied out."""

    def replay(self, q: Tensor) -> Answer:
        if self.asked is not None:
            self.asked()
        self.q[: len(q)].copy_(q)
        self.graph.replay()
        self.done.record()
        self.asked = Answer(self, len(q))
        return self.asked


@dataclass
class Kind:
    """What is kept of queries that one recording could serve."""

    runs: int = 0
    recordings: list[Recording] = field(default_factory=list)


class Recorder:
    """Recordings of one device share memory for what is between their kernels, for they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def run(self, kept: dict[Any, Any], key: Any, q: Tensor, attend: Callable[[Tensor], State]) -> Answer | None:
        """Begins attend(q) of q [T, Hq, D] on the current stream; None while it is not worth recording.

        Query rows are padded to a power of two, so that few recordings serve all T: rows do not depend on one another.
        """
        rows = 1 << (len(q) - 1).bit_length()
        kind: Kind = kept.setdefault((key, rows, q.dtype), Kind())
        kind.runs += 1
        if kind.runs <= RECORD_AFTER:
            return None
        if len(kind.recordings) < SLOTS and all(each.asked for each in kind.recordings):
            kind.recordings.insert(0, self._record(rows, q, attend))
        next_one = kind.recordings.pop(0)
        kind.recordings.append(next_one)
        return next_one.replay(q)

    def _record(self, rows: int, like: Tensor, attend: Callable[[Tensor], State]) -> Recording:
        q = torch.zeros(rows, *like.shape[1:], dtype=like.dtype, pin_memory=True)
        out = torch.empty_like(q, pin_memory=True)
        lse = torch.empty(q.shape[:2], pin_memory=True)

        def run() -> None:
            for host, device in zip((out, lse), attend(q.to("cuda", non_blocking=True)), strict=True):
                host.copy_(device, non_blocking=True)

        run()  # with this number of rows: what it compiles must be there
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
        return Recording(graph, torch.cuda.Event(), q, out, lse)
