"""Attention over rows that stay where they are, recorded once and replayed: one launch by the host, not one a kernel.

A recording reads the very addresses it was made with: those of the rows, with which it is kept (`kept`) and must go
when they move, and those of its own pinned memory, from which queries go to the device and to which answers come.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.backend import Attended
from kvstore_kernels.build import DeviceError

RECORD_AFTER = 2
"""Runs of the same kind that are launched kernel by kernel first: not every row is asked for often."""
SLOTS = 2
"""Recordings of one kind: one may be asked while the answer of the other is on its way."""


class Answer:
    """Of one replay; copied out of the recording's memory by whoever asks first, or when that memory is needed."""

    def __init__(self, recording: "Recording", rows: int) -> None:
        self._recording, self._rows = recording, rows
        self._lock = threading.Lock()
        self._answer: Attended | None = None

    def ready(self) -> bool:
        return self._answer is not None or self._recording.done.query()

    def __call__(self) -> Attended:
        with self._lock:
            if self._answer is None:
                recording, rows = self._recording, self._rows
                recording.done.synchronize()
                out, lse, *variances = (each.rows(rows) for each in recording.answer)
                self._answer = out, lse, variances[0] if variances else None
                recording.asked = None
            return self._answer


class Pinned:
    """Host memory that recordings read and write, a few rows each: copied without letting go of the interpreter, which
    torch and numpy would do for that long and wait for it after."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._array = _array(tensor)
        self._bytes = self._array.data.cast("B")
        self._row_bytes = len(self._bytes) // len(self._array)

    def fill(self, tensor: Tensor) -> None:
        """The first rows."""
        data = _array(tensor).data.cast("B")
        self._bytes[: len(data)] = data

    def rows(self, count: int) -> Tensor:
        """A copy of the first rows."""
        copied = np.frombuffer(bytearray(self._bytes[: count * self._row_bytes]), self._array.dtype)
        rows = torch.from_numpy(copied.reshape(count, *self._array.shape[1:]))
        return rows if rows.dtype == self.tensor.dtype else rows.view(self.tensor.dtype)


@dataclass
class Recording:
    launch: Callable[[], object]
    done: torch.cuda.Event
    stream: torch.cuda.Stream
    q: "Pinned"
    answer: "list[Pinned]"
    asked: Answer | None = None
    """What is still to be copied out."""

    def replay(self, q: Tensor) -> Answer:
        if (before := self.asked) is not None:  # which another thread may take at this moment
            before()
        self.q.fill(q)
        self.launch()
        self.done.record(self.stream)
        self.asked = Answer(self, len(q))
        return self.asked


@dataclass
class Recordings:
    """What is kept of queries that one recording could serve."""

    runs: int = 0
    made: list[Recording] = field(default_factory=list)


class _Launch:
    """Launches a graph where it was made: torch would first have to be told the stream, which takes longer."""

    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]

        self._graph, self._failures = graph, runtime.CUDARuntimeError
        self._launch = partial(runtime.graphLaunch, graph.raw_cuda_graph_exec(), stream.cuda_stream)

    def __call__(self) -> None:
        try:
            self._launch()
        except self._failures as error:
            raise DeviceError(f"a recording cannot be launched: {error}") from error


class Recorder:
    """Recordings of one device share memory for what is between their kernels, for they never run at the same time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None

    def run(self, kept: dict[Any, Any], key: Any, q: Tensor, attend: Callable[[Tensor], Attended]) -> Answer | None:
        """Begins attend(q) of q [T, Hq, D] on the stream, which is current; None while it is not worth recording.

        Query rows are padded to a power of two, so that few recordings serve all T: rows do not depend on one another.
        """
        recordings: Recordings = kept.setdefault(_name(key, q), Recordings())
        recordings.runs += 1
        if recordings.runs <= RECORD_AFTER:
            return None
        made = recordings.made
        if len(made) < SLOTS and all(each.asked for each in made):
            made.insert(0, self._record(_rows(q), q, attend))
        made.append(made.pop(0))
        return made[-1].replay(q)

    def again(self, kept: dict[Any, Any], key: Any, q: Tensor) -> Answer | None:
        """As `run` where a recording is free, whatever stream is current; None otherwise."""
        recordings: Recordings | None = kept.get(_name(key, q))
        if recordings is None or not recordings.made or recordings.made[0].asked:
            return None
        made = recordings.made
        made.append(made.pop(0))
        return made[-1].replay(q)

    def _record(self, rows: int, like: Tensor, attend: Callable[[Tensor], Attended]) -> Recording:
        q = torch.zeros(rows, *like.shape[1:], dtype=like.dtype, pin_memory=True)
        like_answer = attend(q.to("cuda"))  # with this number of rows: what it compiles must be there
        answer = [torch.empty_like(part, device="cpu", pin_memory=True) for part in like_answer if part is not None]

        def run() -> None:
            found = [part for part in attend(q.to("cuda", non_blocking=True)) if part is not None]
            for host, device in zip(answer, found, strict=True):
                host.copy_(device, non_blocking=True)

        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
        launch = _Launch(graph, self._stream)
        return Recording(launch, torch.cuda.Event(), self._stream, Pinned(q), list(map(Pinned, answer)))


def _rows(q: Tensor) -> int:
    """Of the recording that serves q."""
    return 1 << (len(q) - 1).bit_length()


def _name(key: Any, q: Tensor) -> tuple[Any, int, torch.dtype]:
    return key, _rows(q), q.dtype


def _array(tensor: Tensor) -> NDArray[Any]:
    """The rows of a host tensor as numpy can hold them."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
