"""Every kernel compiles for sm_80 and sm_90a and keeps what it computes with in registers; that takes no GPU."""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from kvstore_kernels import build
from kvstore_kernels.cuda import (
    affine,
    attend,
    decode,
    dense,
    encode,
    encoders,
    expand,
    pack_page,
    score,
    score_at,
    topk,
)
from kvstore_kernels.types import AffineEncoder, SignLayout
from tests.kernels.inputs import expansion, sign_encoder

QJL = expansion((8,), 128, query_bits=8)
OUTLIERS = expansion((11,), 128, groups=2)
AFFINE = expansion((8,), 128, groups=4, offsets=True)
FINE = expansion((8,), 128, query_bits=12)
DEEP = expansion((16,), 128)
IN_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def ends(variants: Iterable[build.Variant]) -> Iterator[build.Variant]:
    """Of each kernel the first and the last."""
    by_name: dict[str, list[build.Variant]] = {}
    for variant in variants:
        by_name.setdefault(variant[0], []).append(variant)
    for own in by_name.values():
        yield own[0]
        if len(own) > 1:
            yield own[-1]


def without_warpgroups() -> Iterator[build.Variant]:
    """Attention on devices before Hopper."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "has_warpgroups", lambda _: False)
        for soft_cap in (False, True):
            variants = attend.variants(QJL, QJL, debias=False, soft_cap=soft_cap)
            yield from ends(each for each in variants if each[0] == "attend_many")


def encoding() -> Iterator[build.Variant]:
    for planes in (1, 3):
        encoder = sign_encoder(128, planes)
        m = encode.macros(encoders.on_device(encoder, torch.device("cpu")).codes, encoder, torch.float16)
        yield "encode", {**m, "WARPS": encode.WARPS[0], "RESIDENT": 1}, 0
    layout = SignLayout(128, 4, ((0, 1, 2, 3) * 2,), has_offsets=True)
    yield "affine", affine.macros(AffineEncoder(layout, 2, torch.zeros(1, 128)), torch.float16), 0


VARIANTS = [
    *ends(attend.variants(QJL, QJL, debias=False)),
    *ends(attend.variants(QJL, QJL, debias=False, soft_cap=True)),
    *ends(attend.variants(OUTLIERS, AFFINE, debias=True)),
    *ends(attend.variants(FINE, FINE, debias=False)),
    *ends(attend.variants(FINE, DEEP, debias=True)),
    *ends(attend.variants(FINE, DEEP, debias=True, soft_cap=True)),
    *without_warpgroups(),
    *ends(score.variants(QJL)),
    *ends(score.variants(QJL, soft_cap=True)),
    *list(score.variants(AFFINE))[-1:],
    *ends(score_at.variants(OUTLIERS)),
    *list(score_at.variants(AFFINE))[-1:],
    *ends(decode.variants(QJL)),
    *list(decode.variants(AFFINE))[:1],
    *ends(dense.variants(128, torch.float16)),
    *ends(topk.variants()),
    *ends(expand.variants(128)),
    *pack_page.variants(),
    *encoding(),
]


def compiler_log(text: str, macros: build.Macros, architecture: str, *options_before: str) -> str:
    """What NVRTC and ptxas say of a source text that compiles; KernelBuildError if it does not."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="compiling takes cuda-bindings and NVRTC")
    more = ("-ftz=true", f"--gpu-architecture={architecture}", "--ptxas-options=-v")
    options = [option.encode() for option in (*build.options(macros), *options_before, *more)]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise build.KernelBuildError(log.decode())
    return log.decode()


def bytes_in_memory(log: str) -> int:
    """Of a thread's own variables, which belong in registers."""
    found = IN_MEMORY.findall(log)
    assert found, log
    return sum(int(size) for entry in found for size in entry)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant[0])
def test_kernels_compile_and_stay_in_registers(variant: build.Variant, architecture: str) -> None:
    name, macros, _ = variant
    if "WARPGROUPS" in macros and architecture == "sm_80":
        pytest.skip("a kernel that is Hopper's alone")
    log = compiler_log(build.source(name), macros, architecture)
    assert bytes_in_memory(log) == 0, log
    assert "warning" not in log


def test_every_kernel_is_compiled_here() -> None:
    assert {name for name, *_ in VARIANTS} == {path.stem for path in build.CSRC.glob("*.cu")}


def test_a_kernel_that_spills_is_found() -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
        float v[128];
        for (int i = 0; i < 128; i++) v[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < 128; i++) x[i * 1024 + threadIdx.x] = v[i] + v[(i + 1) % 128];
    }"""
    assert bytes_in_memory(compiler_log(text, {}, "sm_80")) > 0


def test_a_kernel_that_does_not_compile_is_found() -> None:
    with pytest.raises(build.KernelBuildError, match="undefined"):
        compiler_log('extern "C" __global__ void broken(int* x) { *x = missing; }', {}, "sm_80")


def test_hoppers_own_instructions_compile_beside_the_architecture_that_cupy_asks_for() -> None:
    text = 'extern "C" __global__ void fence() { asm volatile("wgmma.fence.sync.aligned;"); }'
    compiler_log(text, {}, "sm_90", *build.HOPPER_OPTIONS)
    with pytest.raises(build.KernelBuildError, match="not supported"):
        compiler_log(text, {}, "sm_90")


def test_a_change_of_a_header_changes_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csrc = shutil.copytree(build.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(build, "CSRC", csrc)
    before = build.source("score")
    assert before.startswith("// headers ")
    assert build.source("score") == before
    (csrc / "ptx.cuh").write_text((csrc / "ptx.cuh").read_text() + "\n")
    after = build.source("score")
    assert after.splitlines()[1:] == before.splitlines()[1:]
    assert after.splitlines()[0] != before.splitlines()[0]


def test_attention_is_arranged_for_the_shared_memory_that_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 has 164 KiB, of which a block may have 163."""
    deep = expansion((16,), 128)
    on_hopper = [shared for _, _, shared in attend.variants(deep, deep, debias=False)]
    monkeypatch.setattr(build, "shared_memory_bytes", lambda _: 164 * 1024)
    on_ampere = [shared for _, _, shared in attend.variants(deep, deep, debias=False)]
    assert max(on_ampere) <= 163 * 1024 < max(on_hopper)
