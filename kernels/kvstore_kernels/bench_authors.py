"""The QJL authors' own CUDA kernels, built from a checkout that the user names: nothing of theirs is kept here.

As their `plot_runtime.py` times them: keys [1, H, N / 32, 32, 128] in fp16, a sketch of 256 bits, no outlier channels.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BITS, HEAD_DIM, TOKENS_TOGETHER = 256, 128, 32
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"]
"""Of their `setup.py`."""
SOURCES = {"score": "qjl_gqa_score_kernel", "quant": "qjl_quant_kernel"}


class NotBuiltError(RuntimeError):
    """Says why in one line."""


class Authors:
    """Their quantiser and their score of one query token, `group` query heads to a KV head."""

    def __init__(self, checkout: Path) -> None:
        self._modules = {
            name: _build(checkout / "qjl_kernel" / "csrc" / f"{file}.cu") for name, file in SOURCES.items()
        }

    def quantise(self, keys: torch.Tensor) -> Callable[[], Any]:
        """Of keys [N, H, 128] on the device."""
        grouped = keys.transpose(0, 1).unflatten(1, (-1, TOKENS_TOGETHER)).unsqueeze(0).contiguous()
        nowhere = torch.empty(*grouped.shape[:3], 0, dtype=torch.uint8, device=keys.device)
        projection = torch.randn(BITS, HEAD_DIM, device=keys.device)
        return lambda: self._modules["quant"].qjl_quant_half_float(grouped, nowhere, projection, 0)

    def score(self, keys: torch.Tensor, group: int) -> Callable[[], Any]:
        quantised, outliers, outlier_norms = self.quantise(keys)()
        nowhere = torch.empty(*quantised.shape[:3], 0, dtype=torch.uint8, device=keys.device)
        norms = torch.ones_like(outlier_norms)
        q = torch.randn(1, group * keys.shape[1], 1, HEAD_DIM, dtype=torch.float16, device=keys.device)
        projection = torch.randn(HEAD_DIM, BITS, device=keys.device)

        def score() -> Any:
            sketched = q.float() @ projection
            return self._modules["score"].qjl_gqa_score_cuda_half_float(
                quantised, outliers, norms, outlier_norms, nowhere, sketched, q, projection
            )

        return score


def _build(source: Path) -> Any:
    if not source.is_file():
        raise NotBuiltError(f"the checkout has no {source.relative_to(source.parents[2])}")
    if shutil.which("nvcc") is None:
        raise NotBuiltError("there is no nvcc on PATH")
    from torch.utils import cpp_extension

    folder = tempfile.mkdtemp(prefix="kvstore-authors-")
    try:
        return cpp_extension.load(source.stem, [str(source)], extra_cuda_cflags=FLAGS, build_directory=folder)
    except Exception as error:  # a compiler's, a linker's, ninja's: the last line says what
        raise NotBuiltError(str(error).strip().splitlines()[-1][:200]) from error
