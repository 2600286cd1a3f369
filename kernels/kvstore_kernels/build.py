"""Compiles and launches CUDA kernels: the only module that knows CuPy, its compiler and the driver's launch call.

A kernel is `csrc/NAME.cu`, specialised by macros; its entry point has the file's name. CuPy keeps compiled kernels on
disk under a key that leaves out headers found with -I, so the source begins with a digest of them. CuPy always compiles
with `-ftz=true`: float32 below 1.2e-38 counts as zero.
"""

import ctypes
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CSRC = Path(__file__).parent / "csrc"
OPTIONS = ("-std=c++17", "-lineinfo", f"-I{CSRC}")
HOPPER_OPTIONS = ("--gpu-architecture=sm_90a",)
"""CuPy asks for sm_90, which lacks wgmma. Of two architectures NVRTC takes the one with more, since HOPPER_NVRTC."""
HOPPER_NVRTC = (12, 9)
OVERLAP = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h."""

Macros = dict[str, int]
Variant = tuple[str, Macros, int]
"""A kernel's name, macros and bytes of dynamic shared memory."""


class KernelBuildError(RuntimeError):
    """A kernel does not compile; the message holds the compiler's log."""


class DeviceError(RuntimeError):
    """A launch failed. CUDA errors stay: the process cannot go on with this device."""


def source(name: str) -> str:
    """The text to compile for `name`, with the digest of every header before it."""
    headers = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(CSRC.glob("*.cuh"))))
    return f"// headers {headers.hexdigest()}\n{(CSRC / f'{name}.cu').read_text()}"


def options(macros: Macros) -> tuple[str, ...]:
    return (*OPTIONS, *(f"-D{name}={value}" for name, value in sorted(macros.items())))


@cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether kernels are compiled with Hopper's own instructions; without a device as if."""
    if device.type == "cpu":
        return True
    import cupy  # pyright: ignore[reportMissingImports]

    return torch.cuda.get_device_capability(device) == (9, 0) and cupy.cuda.nvrtc.getVersion() >= HOPPER_NVRTC


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory_bytes(device: torch.device) -> int:
    """Of a multiprocessor; without a device of one that has compute capability 9.0."""
    if device.type == "cpu":
        return 228 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on one device."""

    name: str
    device: torch.device
    function: Any  # CuPy's, which keeps the module loaded
    overlaps: bool  # the device lets a kernel start while the one before it ends

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        *arguments: Tensor | int | float | None,
        follows: bool = False,
    ) -> None:
        """Puts the kernel on the device's current stream; never waits.

        Tensors go as pointers, ints as 64-bit and floats as 32-bit numbers. A kernel that `follows` one of the same op
        may start before that one has ended, and itself waits where it needs the other's results.
        """
        values = [_argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(id=OVERLAP, value=1)
        config = _Config(
            grid,
            (threads, 1, 1),
            shared_bytes,
            torch._C._cuda_getCurrentRawStream(self.device.index),  # current_stream() takes longer than the launch
            ctypes.pointer(attribute),
            int(follows and self.overlaps),
        )
        code = _driver().cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(self.function.kernel.ptr), pointers, None
        )
        if code:
            raise DeviceError(f"{self.name}: launch of grid {grid} with {shared_bytes} shared bytes: CUDA error {code}")


def _argument(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value)


@cache
def _compiled(name: str, device: torch.device, macros: tuple[tuple[str, int], ...], shared_bytes: int) -> Kernel:
    import cupy  # pyright: ignore[reportMissingImports]

    more = HOPPER_OPTIONS if has_warpgroups(device) else ()
    with cupy.cuda.Device(device.index):
        module = cupy.RawModule(code=source(name), options=(*options(dict(macros)), *more))
        try:
            function = module.get_function(name)
            # CuPy gives out one function for equal macros: what another size asked for must stay allowed.
            if shared_bytes > function.max_dynamic_shared_size_bytes:
                function.max_dynamic_shared_size_bytes = shared_bytes
        except cupy.cuda.compiler.CompileException as error:
            raise KernelBuildError(f"{name} {dict(macros)}: {error}") from error
    return Kernel(name, device, function, torch.cuda.get_device_capability(device)[0] >= 9)


def kernel(name: str, device: torch.device, macros: Macros, shared_bytes: int = 0) -> Kernel:
    """The kernel for these macros, compiled at its first use; KernelBuildError if it does not compile."""
    return _compiled(name, device, tuple(sorted(macros.items())), shared_bytes)


def warm_up(kernels: Iterable[Variant], device: torch.device) -> None:
    """Compiles and loads these, so that no query waits for a compiler."""
    for name, macros, shared_bytes in kernels:
        kernel(name, device, macros, shared_bytes)
