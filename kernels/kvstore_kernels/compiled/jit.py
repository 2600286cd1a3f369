"""The only module that knows the compiler."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def kernel(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled at its first call for the argument types it meets; runs without the interpreter's lock.

    Machine code is kept beside the source, or in numba's folder of the user's cache; where neither can be written, as
    in a read-only image without a home, every process compiles anew. numba looks at a kernel's own file to tell whether
    kept code is stale, but code has the kernels that it calls inside: the name it is kept under tells all of them. A
    kernel uses no constant of another package, for the same reason.
    """
    function.__qualname__ += f".{SOURCES[:16]}"
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


def reassociating(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose float sums the compiler may split over vector lanes, in the same way at every call."""
    return kernel(function, fastmath={"reassoc", "contract"})
