"""Which device runs the ops, behind one interface."""

import importlib
import importlib.util
from typing import Protocol

from torch import Tensor

from kvstore_kernels import reference
from kvstore_kernels.types import Encoder, Expansion, Rows, Signs


class Backend(Protocol):
    """The ops of one device. Query head h reads KV head h // (Hq / H); a wrong shape is a ValueError that names it."""

    name: str
    """`cpu`, or `cuda:0 <device>`."""

    def encode(self, x: Tensor, encoder: Encoder) -> Signs:
        """Sketches of x [N, H, D], any float dtype; NonFiniteError and ScaleRangeError name the first bad place."""
        ...

    def score(self, q: Tensor, keys: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
        """Logits float32 [T, Hq, N] of q [T, Hq, D], with the soft cap applied."""
        ...

    def attend(
        self, q: Tensor, keys: Rows, values: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0, debias: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Out float32 [T, Hq, D] and natural-log lse float32 [T, Hq]; no tokens give (0, -inf).

        The share `debias` of half of each key's variance is taken off its logit before the soft cap.
        """
        ...

    def decode(self, rows: Rows) -> Tensor:
        """x^ float32 [N, H, D]."""
        ...

    def topk(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Positions int64 and scores float32 [T, Hq, min(k, N)], best first, of equal ones the lower position."""
        ...

    def score_variance(self, q: Tensor, expansion: Expansion, scales: Tensor) -> Tensor:
        """float32 [T, Hq]: the mean over stored tokens of sum_g alpha_g^2 N_g(q), to be multiplied by sm_scale^2."""
        ...


class ReferenceBackend:
    """torch alone: the oracle, and the CPU where numba is not installed."""

    name = "cpu"
    encode = staticmethod(reference.encode)
    score = staticmethod(reference.score)
    attend = staticmethod(reference.attend)
    decode = staticmethod(reference.decode)
    topk = staticmethod(reference.topk)
    score_variance = staticmethod(reference.score_variance)


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
        module = importlib.import_module("kvstore_kernels.cuda_backend")
    except ImportError as error:
        raise RuntimeError(f"{device} cannot be used: {error}") from error
    return module.cuda_backend(device)
