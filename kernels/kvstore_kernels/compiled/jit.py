"""The only module that knows the compiler."""

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled at its first call for the argument types it meets; runs without the interpreter's lock.

    Machine code is kept beside the source, or in numba's folder of the user's cache; where neither can be written, as
    in a read-only image without a home, every process compiles anew.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


def reassociating(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose float sums the compiler may split over vector lanes, in the same way at every call."""
    return kernel(function, fastmath={"reassoc", "contract"})
