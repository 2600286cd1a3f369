"""The ops on one CUDA device, over rows in host memory as well as over what the device holds."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.backend import Attended, State, Stored
from kvstore_kernels.cuda import attend, decode, dense, encode, mixed, pack_page, score, score_at, topk
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, Pages, SignPages, page_bytes
from kvstore_kernels.cuda.replay import Answer, Recorder
from kvstore_kernels.host import HostArray
from kvstore_kernels.merge import merge_states
from kvstore_kernels.paging import Paging
from kvstore_kernels.shapes import check_pair, tokens_of
from kvstore_kernels.types import DenseRows, Encoder, Rows, SignLayout, SignRows, Signs
from kvstore_kernels.variance import ScoreNoise

NOISE = "noise on the device"
"""What is kept with parts of their noise; it belongs to them alone."""
F = TypeVar("F", bound=Callable[..., Any])


def on_stream(method: F) -> F:
    """Runs a method of the backend on its own stream, so that nothing it does is ordered with other users' work."""

    @wraps(method)
    def run(self: "CudaBackend", *args: Any, **kwargs: Any) -> Any:
        with self.ordered():
            return method(self, *args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


class CudaBackend:
    """Calls put work on one stream in their order; only `encode` and what `to_host` returns wait for it.

    Rows in host memory are brought to the device for the one call: right for checks and single answers, too slow to
    serve from. What is served lies on pages (`paging`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = f"{device} {torch.cuda.get_device_name(device)}"
        self.paging: Paging | None = self
        self._stream, self._beside = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._recorder = Recorder(self._stream)

    @property
    def recordings(self) -> int:
        return self._recorder.recorded

    @on_stream
    def encode(self, x: Tensor, encoder: Encoder) -> Signs:
        signs = encode.encode(self._to_device(x), encoder)
        words, scales = self._begin_fetch((signs.words, signs.scales))()
        return Signs(words, scales)

    @on_stream
    def score(self, q: Tensor, keys: Stored, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
        q, keys = self._to_device(q), self._placed(keys, values=False)
        if isinstance(keys, SignPages):
            return score.score(q, keys, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)
        return dense.score(q, keys.data, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)

    @on_stream
    def score_at(
        self, q: Tensor, keys: Stored, positions: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0
    ) -> Tensor:
        q, keys, positions = self._to_device(q), self._placed(keys, values=False), self._to_device(positions)
        how = {"sm_scale": sm_scale, "logit_soft_cap": logit_soft_cap}
        if isinstance(keys, SignPages):
            return score_at.score_at(q, keys, positions, **how)
        return dense.score(q, keys.data, **how).gather(2, positions)

    @on_stream
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
        return self._attend(self._to_device(q), keys, values, sm_scale, logit_soft_cap, debias, None)

    @on_stream
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
        if noise is not None and NOISE not in kept:
            kept[NOISE] = ScoreNoise(self._to_device(noise.form)).variance

        def attend_parts(on_device: Tensor) -> Attended:
            how, variances, dtype = (sm_scale, logit_soft_cap, debias), None, on_device.dtype
            stream, others = torch.cuda.current_stream(self.device), list[State]()
            self._beside.wait_stream(stream)
            with torch.cuda.stream(self._beside):  # small kernels, which need not come before those of the last part
                for keys, values in parts[:-1]:
                    beside = others.pop if others else None
                    others.append(self._attend(on_device, keys, values, *how, beside))
                there = self._beside.record_event()
                if noise is not None:
                    variances = kept[NOISE](on_device)

            def other() -> State:
                stream.wait_event(there)
                return others[0]

            out, lse = self._attend(on_device, *parts[-1], *how, other if others else None, dtype)
            stream.wait_stream(self._beside)
            return out.to(dtype), lse, variances

        if all(_stays(rows) for part in parts for rows in part):
            key = sm_scale, logit_soft_cap, debias, noise is None
            answer = self._recorder.run(kept, key, q, attend_parts)
            if answer is not None:
                return answer
        attended = attend_parts(self._to_device(q))
        fetch = self._begin_fetch([part for part in attended if part is not None])

        def answered() -> Attended:
            out, lse, *variances = fetch()
            return out, lse, variances[0] if variances else None

        return answered

    def attend_again(
        self,
        q: Sequence[HostArray],
        *,
        sm_scale: float,
        logit_soft_cap: float,
        debias: float,
        noise: ScoreNoise | None,
        kept: dict[Any, Any],
    ) -> Answer | None:
        return self._recorder.again(kept, (sm_scale, logit_soft_cap, debias, noise is None), q)

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
        return self.attend(q, *fine, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap, debias=debias)

    @on_stream
    def decode(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
        tokens_of(rows)
        if isinstance(rows, DenseRows):
            return self._to_device(rows.data).to(dtype)
        return decode.decode(self._signs(rows.signs), rows.expansion, dtype)

    @on_stream
    def topk(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return topk.topk(self._to_device(scores), k)

    @on_stream
    def best(
        self, q: Tensor, keys: Stored, k: int, *, sm_scale: float, logit_soft_cap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        q, keys = self._to_device(q), self._placed(keys, values=False)
        if isinstance(keys, SignPages):
            return topk.best(q, keys, k, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)
        return topk.topk(dense.score(q, keys.data, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap), k)

    @on_stream
    def to_host(self, results: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        return self._begin_fetch(results)

    def is_fatal(self, error: BaseException) -> bool:
        """CUDA errors stay with the context; running out of memory is no such error."""
        lost = (build.DeviceError, torch.AcceleratorError)
        return isinstance(error, lost) and not isinstance(error, torch.OutOfMemoryError)

    def ordered(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def beside(self) -> "CudaBackend":
        return CudaBackend(self.device)

    @on_stream
    def allocate(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    @on_stream
    def upload(self, host: Tensor) -> Tensor:
        return self._to_device(host)

    @on_stream
    def pack(self, signs: Signs, layout: SignLayout, pages: Pages, *, values: bool, keep: bool) -> None:
        pack_page.pack_page(self._signs(signs), layout, pages, values=values, keep=keep)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def _attend(
        self,
        q: Tensor,
        keys: Any,
        values: Any,
        sm_scale: float,
        logit_soft_cap: float,
        debias: float,
        beside: Callable[[], State] | None,
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """Over rows anywhere; q is on the device. `beside()` is a result over other rows, and is merged in.

        Out is of `dtype` or float32.
        """
        if not isinstance(keys, SignPages) and not isinstance(values, SignPages):
            check_pair(keys, values)
        keys = self._placed(keys, values=False)
        if isinstance(keys, SignPages) and not isinstance(values, DenseRows):
            return attend.attend(
                q,
                keys,
                self._placed(values, values=True),
                sm_scale=sm_scale,
                logit_soft_cap=logit_soft_cap,
                debias=debias,
                dtype=dtype if dtype == torch.float16 else torch.float32,
                beside=beside,
            )
        if isinstance(values, DenseRows):
            values = DenseRows(self._to_device(values.data))
        assert not isinstance(values, SignPages)
        if isinstance(keys, DenseRows) and isinstance(values, DenseRows):
            state = dense.attend(q, keys.data, values.data, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)
        else:
            state = mixed.attend(q, keys, values, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap, debias=debias)
        return state if beside is None else merge_states([beside(), state])

    def _begin_fetch(self, results: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        copies = [self.pinned((*each.shape,), each.dtype) if each.is_cuda else each for each in results]
        for copy, result in zip(copies, results, strict=True):
            if result.is_cuda:
                copy.copy_(result, non_blocking=True)
        done = torch.cuda.Event()
        done.record(self._stream)

        def fetch() -> Sequence[Tensor]:
            done.synchronize()
            return copies

        return fetch

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.is_cuda else tensor.to(self.device, non_blocking=tensor.is_pinned())

    def _signs(self, signs: Signs) -> Signs:
        return Signs(self._to_device(signs.words), self._to_device(signs.scales))

    def _placed(self, rows: Stored, *, values: bool) -> Any:
        """Rows on the device; sketches in host memory go to pages made for the call."""
        if isinstance(rows, SignPages):
            return rows
        tokens = tokens_of(rows)
        if isinstance(rows, DenseRows):
            return DenseRows(self._to_device(rows.data))
        assert isinstance(rows, SignRows)
        layout, count = rows.expansion.layout, -(-tokens // PAGE_TOKENS)
        slab = torch.empty(count * page_bytes(layout), dtype=torch.uint8, device=self.device)
        table = torch.arange(count, dtype=torch.int32, device=self.device) * (page_bytes(layout) // PAGE_UNIT)
        pages = Pages(slab, table, 0, tokens)
        pack_page.pack_page(self._signs(rows.signs), layout, pages, values=values)
        return SignPages(pages, rows.expansion)


def _stays(rows: Stored) -> bool:
    """Whether rows lie on the device, where a recording may find them again."""
    return isinstance(rows, SignPages) or (isinstance(rows, DenseRows) and rows.data.is_cuda)


def open_cuda(name: str) -> CudaBackend:
    """The backend of `cuda:N`; RuntimeError, saying why, if there is no such device, CuPy or driver."""
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(f"{name} cannot be used: {error} (install the extra cuda12 or cuda13)") from error
    if not torch.cuda.is_available():
        raise RuntimeError(f"{name} cannot be used: torch sees no CUDA device")
    device = torch.device(name)
    if (device.index or 0) >= min(torch.cuda.device_count(), cupy.cuda.runtime.getDeviceCount()):
        raise RuntimeError(f"{name} cannot be used: there are {torch.cuda.device_count()} CUDA devices")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError(f"{name} cannot be used: its compute capability is below 8.0")
    return CudaBackend(device)
