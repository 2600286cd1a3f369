"""Which device runs the ops, behind one interface."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from kvstore_kernels import reference
from kvstore_kernels.host import HostArray
from kvstore_kernels.merge import merge_states
from kvstore_kernels.paging import Paging
from kvstore_kernels.refined import Ops, attend_refined, score_at
from kvstore_kernels.types import Encoder, Rows, Signs
from kvstore_kernels.variance import ScoreNoise

State = tuple[Tensor, Tensor]
Attended = tuple[Tensor, Tensor, Tensor | None]
"""Out [T, Hq, D] in q's dtype, natural-log lse float32 [T, Hq] and, if asked for, variances of logits of that shape."""
AttendedHost = tuple[HostArray, HostArray, HostArray | None]
"""The same."""
Stored = Any
"""Rows in host memory; a backend with `paging` also reads what its device holds: SignPages, and DenseRows there."""


class Replayed(Protocol):
    """A result that is on its way."""

    def host(self) -> AttendedHost:
        """Waits for it."""
        ...

    def ready(self) -> bool:
        """Whether it is there."""
        ...


class Backend(Protocol):
    """The ops of one device. Query head h reads KV head h // (Hq / H); a wrong shape is a ValueError that names it.

    What score, attend, decode, topk and best return stays on the device; `to_host` brings it.
    """

    paging: Paging | None
    """None where the ops read host memory."""
    name: str
    """`cpu`, or `cuda:0 <device>`."""

    @property
    def recordings(self) -> int:
        """How many launches were recorded, each in one call of `attend_all` that took longer for it."""
        ...

    def encode(self, x: Tensor, encoder: Encoder) -> Signs:
        """Sketches in host memory of x [N, H, D], any float dtype.

        NonFiniteError and ScaleRangeError name the first bad place.
        """
        ...

    def score(self, q: Tensor, keys: Stored, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
        """Logits float32 [T, Hq, N] of q [T, Hq, D], with the soft cap applied."""
        ...

    def score_at(
        self, q: Tensor, keys: Stored, positions: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0
    ) -> Tensor:
        """Those of the logits of `score` that are at positions int64 [T, Hq, C]; no bits of other sketches are read."""
        ...

    def attend(
        self,
        q: Tensor,
        keys: Stored,
        values: Stored,
        *,
        sm_scale: float,
        logit_soft_cap: float = 0.0,
        debias: float = 0.0,
    ) -> State:
        """Out float32 [T, Hq, D] and natural-log lse float32 [T, Hq]; no tokens give (0, -inf).

        The share `debias` of half of each key's variance is taken off its logit before the soft cap.
        """
        ...

    def attend_all(
        self,
        q: Tensor,
        parts: Sequence[tuple[Stored, Stored]],
        *,
        sm_scale: float,
        logit_soft_cap: float,
        debias: float,
        noise: ScoreNoise | None,
        kept: dict[Any, Any],
    ) -> Callable[[], Attended]:
        """Begins `attend` over the keys and values of all of at least one part; what it returns waits for the result.

        With `noise` the variances of q's logits come too. `kept` belongs to exactly these parts: a backend keeps in it
        what makes the next call cheaper.
        """
        ...

    def attend_again(
        self,
        q: Sequence[HostArray],
        *,
        sm_scale: float,
        logit_soft_cap: float,
        debias: float,
        noise: ScoreNoise | None,
        kept: dict[Any, Any],
    ) -> Replayed | None:
        """What `attend_all` begins for the parts of `kept`, if that takes no more than a launch; None otherwise.

        `q` are rows [T, Hq, D] of one dtype, one part after another.
        """
        ...

    def attend_refined(
        self,
        q: Tensor,
        coarse: tuple[Stored, Stored],
        fine: tuple[Stored, Stored],
        best: int,
        *,
        sm_scale: float,
        logit_soft_cap: float,
        debias: float,
    ) -> State:
        """As `attend` over `coarse`, but the `best` tokens of each query row and head by coarse logits from `fine`.

        Keys and values are of the same sketches at two levels. A CUDA device reads all of `fine`.
        """
        ...

    def decode(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
        """x^ [N, H, D]."""
        ...

    def topk(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Positions int64 and scores float32 [T, Hq, min(k, N)], best first, of equal ones the lower position."""
        ...

    def best(
        self, q: Tensor, keys: Stored, k: int, *, sm_scale: float, logit_soft_cap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """`topk` of `score`."""
        ...

    def to_host(self, results: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        """Begins to bring results of these ops to host memory; what it returns waits for them."""
        ...

    def is_fatal(self, error: BaseException) -> bool:
        """Whether an error means that the device is lost."""
        ...

    def ordered(self) -> AbstractContextManager[object]:
        """While it is entered, what torch does on this thread is ordered with the ops."""
        ...

    def beside(self) -> "Backend":
        """The same device for another thread, whose work is not ordered with this one's."""
        ...


class ReferenceBackend:
    """torch alone: the oracle, and the CPU where numba is not installed."""

    name: str = "cpu"
    paging: Paging | None = None
    recordings: int = 0
    encode = staticmethod(reference.encode)
    score = staticmethod(reference.score)
    topk = staticmethod(reference.topk)
    attend = staticmethod(reference.attend)
    _decode = staticmethod(reference.decode)
    _ops = Ops(reference.logits, reference.topk, reference.weigh)

    def score_at(
        self, q: Tensor, keys: Rows, positions: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0
    ) -> Tensor:
        return score_at(self._ops, q, keys, positions, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)

    def attend_refined(
        self,
        q: Tensor,
        coarse: tuple[Rows, Rows],
        fine: tuple[Rows, Rows],
        best: int,
        *,
        sm_scale: float,
        logit_soft_cap: float,
        debias: float,
    ) -> State:
        how = {"sm_scale": sm_scale, "logit_soft_cap": logit_soft_cap, "debias": debias}
        return attend_refined(self._ops, q, coarse, fine, best, **how)

    def attend_all(
        self,
        q: Tensor,
        parts: Sequence[tuple[Rows, Rows]],
        *,
        sm_scale: float,
        logit_soft_cap: float,
        debias: float,
        noise: ScoreNoise | None,
        kept: dict[Any, Any],
    ) -> Callable[[], Attended]:
        states = [
            self.attend(q, keys, values, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap, debias=debias)
            for keys, values in parts
        ]
        out, lse = states[0] if len(states) == 1 else merge_states(states)
        attended = out.to(q.dtype), lse, None if noise is None else noise.variance(q)
        return lambda: attended

    def attend_again(self, q: Sequence[HostArray], **_: Any) -> Replayed | None:
        return None

    def decode(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._decode(rows).to(dtype)

    def best(self, q: Tensor, keys: Rows, k: int, *, sm_scale: float, logit_soft_cap: float = 0.0) -> State:
        return self.topk(self.score(q, keys, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap), k)

    def to_host(self, results: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        return lambda: results

    def is_fatal(self, error: BaseException) -> bool:
        return False

    def ordered(self) -> AbstractContextManager[object]:
        return nullcontext()

    def beside(self) -> Backend:
        return self


def cpu_backend() -> Backend:
    """The compiled ops where numba is installed, else the reference."""
    if importlib.util.find_spec("numba") is None:
        return ReferenceBackend()
    from kvstore_kernels.compiled.backend import CompiledBackend

    return CompiledBackend()


def open_backend(device: str) -> Backend:
    """The backend of `cpu`, `cuda:N`, or `auto`: a CUDA device where one can be used, else the CPU.

    RuntimeError, saying why, where a CUDA device is asked for and cannot be used; ValueError for another name.
    """
    if device == "cpu":
        return cpu_backend()
    if device == "auto":
        try:
            return _cuda_backend("cuda:0")
        except RuntimeError:
            return cpu_backend()
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise ValueError(f"device {device!r} is not auto, cpu or cuda:N")
    return _cuda_backend(device)


def _cuda_backend(device: str) -> Backend:
    try:
        module = importlib.import_module("kvstore_kernels.cuda.backend")
    except ImportError as error:
        raise RuntimeError(f"{device} cannot be used: {error}") from error
    return module.open_cuda(device)
