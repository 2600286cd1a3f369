"""Values of tensors, such as plans, on another device: the reference ops run where their tensors are."""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def placed(value: T, device: torch.device) -> T:
    """The value with every tensor in it, in tuples and fields of dataclasses too, on `device`."""
    return value if device.type == "cpu" else _placed(value, device, {})


def _placed(value: Any, device: torch.device, known: dict[int, Any]) -> Any:
    """What heads share stays shared: encoders are told apart by their id."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_placed(each, device, known) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        if id(value) not in known:
            moved = {f.name: _placed(getattr(value, f.name), device, known) for f in fields(value) if f.init}
            known[id(value)] = type(value)(**moved)
        return known[id(value)]
    return value
