"""What a kernel wants of an expansion or encoder, on its device: made once, gone with what it was made of."""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def kept(prepare: Callable[[T, torch.device], R]) -> Callable[[T, torch.device], R]:
    """`prepare`, called at the first use of an object on a device; its result is kept as long as the object lives."""
    ready: dict[tuple[int, torch.device], R] = {}

    @wraps(prepare)
    def get(of: T, device: torch.device) -> R:
        key = (id(of), device)
        if key not in ready:
            ready[key] = prepare(of, device)
            weakref.finalize(of, ready.pop, key, None)
        return ready[key]

    return get
