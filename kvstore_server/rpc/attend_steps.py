"""Steps of an Attend stream: while they are in flight, and what is kept of them for those that ask the same."""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.scheduling.completion import Told
from kvstore_server.sessions.model import AttendAnswer
from kvstore_server.sessions.querying import Prepared


class Terms(NamedTuple):
    """What a step says of itself beside its number and what it asks."""

    timeout_ms: int
    lse_base: pb.LseBase.ValueType
    items: int


@dataclass(slots=True)
class StepInFlight:
    """What is known of a step until it is answered, and what there is to undo when it is late or unwanted."""

    request_id: int
    terms: Terms
    bytes: int
    begun: float
    deadline: float
    missing: int
    """Items without an answer."""
    answers: dict[int, AttendAnswer] = field(default_factory=dict)
    parts: "list[Told[AttendAnswer] | asyncio.Task[AttendAnswer]]" = field(default_factory=list)

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()


@dataclass(frozen=True, slots=True)
class Known:
    """Steps of one item that ask the same but for their numbers."""

    terms: Terms
    prepared: Prepared
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int
    """Of q's data."""


Begin: TypeAlias = Callable[[StepInFlight, bytes], None]
"""Asks for the answers of all items of a step with q's data."""


def asked_of(step: pb.AttendStep, item: pb.AttendStep.Item, shape: tuple[int, ...]) -> Hashable:
    """Equal for items that ask the same of rows of this shape."""
    debias = step.debias if step.HasField("debias") else None
    levels = None
    if step.HasField("precision"):  # field by field: its bytes would have what somebody sends and nobody knows, too
        levels = step.precision.keys_level, step.precision.values_level, step.precision.require_precision
    what = step.layer, step.head_offset, step.refine, debias, levels, step.lse_base
    return item.handle, item.end, item.rows, step.q.dtype, shape, what
