"""Attention over rows that stay where they are, recorded once and replayed: one launch by the host, not one a kernel.

A recording reads the very addresses it was made with: those of the rows, with which it is kept (`kept`) and must go
when they move, and those of its own pinned memory, from which queries go to the device and to which answers come.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.backend import Attended, AttendedHost
from kvstore_kernels.build import DeviceError
from kvstore_kernels.host import HostArray

RECORD_AFTER = 2
"""Runs of the same kind that are launched kernel by kernel first: not every row is asked for often."""
SLOTS = 2
"""Recordings of one kind: one may be asked while the answer of the other is on its way."""


class Answer:
    """Of one replay; copied out of the recording's memory by whoever asks first, or when that memory is needed."""

    def __init__(self, recording: "Recording", rows: int) -> None:
        self._recording, self._rows = recording, rows
        self._lock = threading.Lock()
        self._answer: AttendedHost | None = None
        self._is_there = False

    def ready(self) -> bool:
        self._is_there = self._is_there or self._answer is not None or self._recording.done.query()
        return self._is_there

    def host(self) -> AttendedHost:
        with self._lock:
            if self._answer is None:
                recording, rows = self._recording, self._rows
                if not self._is_there:
                    recording.done.synchronize()
                out, lse, *variances = recording.answer.rows(rows)
                self._answer = out, lse, variances[0] if variances else None
                recording.asked = None
            return self._answer

    def __call__(self) -> Attended:
        out, lse, variances = self.host()
        return out.tensor(), lse.tensor(), None if variances is None else variances.tensor()


class Pinned:
    """Host memory that recordings read and write, for tensors like these: copied at once and without letting go of the
    interpreter, which torch and numpy would do for that long and wait for it after."""

    def __init__(self, like: Sequence[Tensor], allocate: Callable[[int], NDArray[np.uint8]]) -> None:
        starts = [0, *accumulate(part.nbytes for part in like)]
        self.memory = allocate(starts[-1])
        self._bytes = self.memory.data
        whole = torch.from_numpy(self.memory)
        self.tensors = [
            whole[start : start + part.nbytes].view(part.dtype).view(part.shape)
            for start, part in zip(starts, like, strict=False)
        ]
        self._parts = [(start, part.dtype, part.shape[1:]) for start, part in zip(starts, like, strict=False)]

    def fill(self, parts: Sequence[HostArray]) -> None:
        """The first rows of the only tensor."""
        end = 0
        for part in parts:
            data = part.array.data.cast("B")
            begin, end = end, end + len(data)
            self._bytes[begin:end] = data

    def rows(self, count: int) -> list[HostArray]:
        """The first rows of each tensor, in a copy."""
        copied = bytes(self._bytes)
        return [HostArray.read(copied, dtype, (count, *shape), start) for start, dtype, shape in self._parts]


@dataclass
class Recording:
    launch: Callable[[], object]
    done: torch.cuda.Event
    stream: torch.cuda.Stream
    q: Pinned
    answer: Pinned
    asked: Answer | None = None
    """What is still to be copied out."""

    def replay(self, parts: Sequence[HostArray], rows: int) -> Answer:
        if (before := self.asked) is not None:  # which another thread may take at this moment
            before.host()
        self.q.fill(parts)
        self.launch()
        self.done.record(self.stream)
        self.asked = Answer(self, rows)
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
        self._recorded = torch.cuda.Stream(stream.device)
        """Nothing else uses it: what another thread puts on a stream that is recorded, be it the event with which torch
        takes back pinned memory, becomes part of the recording and an error of whoever asks for it."""
        self._pool: Any = None
        self.recorded = 0
        """How many recordings were made."""

    def run(self, kept: dict[Any, Any], key: Any, q: Tensor, attend: Callable[[Tensor], Attended]) -> Answer | None:
        """Begins attend(q) of q [T, Hq, D] on the stream, which is current; None while it is not worth recording.

        Query rows are padded to a power of two, so that few recordings serve all T: rows do not depend on one another.
        """
        recordings: Recordings = kept.setdefault(_name(key, len(q), q.dtype), Recordings())
        recordings.runs += 1
        if recordings.runs <= RECORD_AFTER:
            return None
        made = recordings.made
        if len(made) < SLOTS and all(each.asked for each in made):
            made.insert(0, self._record(_rows(len(q)), q, attend))
        made.append(made.pop(0))
        return made[-1].replay([HostArray.of(q)], len(q))

    def again(self, kept: dict[Any, Any], key: Any, parts: Sequence[HostArray]) -> Answer | None:
        """As `run` of all parts' rows where a recording is free, whatever stream is current; None otherwise."""
        rows = sum([len(part.array) for part in parts])
        recordings: Recordings | None = kept.get(_name(key, rows, parts[0].dtype))
        if recordings is None or not recordings.made or recordings.made[0].asked:
            return None
        made = recordings.made
        made.append(made.pop(0))
        return made[-1].replay(parts, rows)

    def _record(self, rows: int, like: Tensor, attend: Callable[[Tensor], Attended]) -> Recording:
        pinned_q = Pinned([like.new_empty((rows, *like.shape[1:]))], _pinned)
        q = pinned_q.tensors[0].zero_()
        like_answer = attend(q.to("cuda"))  # with this number of rows: what it compiles must be there
        answer = Pinned([part for part in like_answer if part is not None], _pinned)
        asked, answered = _mapped(pinned_q).view(q.dtype).view(q.shape), _mapped(answer)

        def run() -> None:
            found = [part for part in attend(asked * 1) if part is not None]  # copied by a kernel
            torch.cat([part.flatten().view(torch.uint8) for part in found], out=answered)

        self.recorded += 1
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        with torch.cuda.stream(self._recorded):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        launch = _Launch(graph, self._stream)
        return Recording(launch, torch.cuda.Event(), self._stream, pinned_q, answer)


def _pinned(size: int) -> NDArray[np.uint8]:
    """Host memory that torch does not take back by itself, because it would then use the stream that was recorded."""
    from cupy.cuda import alloc_pinned_memory  # pyright: ignore[reportMissingImports]

    return np.frombuffer(alloc_pinned_memory(size), np.uint8, size)


@dataclass(frozen=True)
class _Mapped:
    """Pinned memory, for torch to take for the device's own: kernels reach it over the bus, and much sooner than a copy
    between them would have begun and ended."""

    memory: NDArray[np.uint8]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.memory.shape, "typestr": "|u1", "data": (self.memory.ctypes.data, False), "version": 3}


def _mapped(pinned: Pinned) -> Tensor:
    mapped = torch.as_tensor(_Mapped(pinned.memory), device="cuda")
    assert mapped.data_ptr() == pinned.memory.ctypes.data, "a copy is not what is sent and answered"
    return mapped


def _rows(count: int) -> int:
    """Of the recording that serves so many."""
    return 1 << (count - 1).bit_length()


def _name(key: Any, rows: int, dtype: torch.dtype) -> tuple[Any, int, torch.dtype]:
    return key, _rows(rows), dtype
