"""What each head should keep under a budget, by what keeping less of it does to the next token's distribution.

The greedy search of MatryoshkaKV (arXiv 2410.14731, algorithm 1) lowers heads from everything, a step of one head at a
time, always where the KL rises least. Water-filling is a far shorter way to nearly the same place: from there steps are
exchanged between heads as long as the KL falls.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvstore_client.projections.allotment import allotted, most_of
from kvstore_client.projections.bases import TrainableBases
from kvstore_client.projections.student import Sample, Student, divergence, logits_of, student_logits
from kvstore_client.projections.surrogates import Codec
from kvstore_codecs.artifact import Projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Start = Literal["water-filling", "full"]
Cost = Callable[[Tensor], float]
"""KL in nats of amounts [kinds, L, H]."""


@dataclass(frozen=True)
class SearchSettings:
    """What makes a search what it is."""

    codec: Codec
    budgets: tuple[float, ...]
    start: Start = "water-filling"
    step: int = 1
    """Words or coordinates that a head gives up or takes at once."""
    floor: int = 0
    """What every head keeps."""
    at_once: int = 1
    """From full: heads that are lowered after each sweep over all of them. The authors' code lowers three quarters."""
    sweeps_max: int = 4
    """From water-filling: sweeps for one budget."""


@dataclass(frozen=True, eq=False)
class Found:
    """Where a search for one budget stands: `amounts` int32 [kinds, L, H] after `sweeps`, and their KL."""

    budget: float
    amounts: Tensor
    kl: float
    kl_start: float
    sweeps: int
    ended: bool


class Divergence:
    """The KL of amounts: mean over texts, against the model as it is."""

    def __init__(
        self, model: "PreTrainedModel", projection: Projection, codec: Codec, samples: Sequence[Sample]
    ) -> None:
        self._model, self._samples = model, samples
        self._codec: Codec = codec
        self._device = next(model.parameters()).device
        with torch.no_grad():
            self._coordinates = TrainableBases(projection).to(self._device)()
        self._teacher = [logits_of(model, sample) for sample in samples]

    def __call__(self, amounts: Tensor) -> float:
        student = Student(self._codec, self._coordinates, amounts.to(self._device))
        with torch.no_grad():
            found = [
                divergence(teacher, student_logits(self._model, sample, student))
                for teacher, sample in zip(self._teacher, self._samples, strict=True)
            ]
        return torch.stack(found).mean().item()


def search(
    projection: Projection, settings: SearchSettings, cost: Cost, known: Sequence[Found] = ()
) -> Iterator[Found]:
    """States of the search, one after each sweep, the last of each budget ended; goes on after the `known` ones."""
    most = most_of(settings.codec, projection.header.head_dim)
    latest = {found.budget: found for found in known}
    amounts = torch.full_like(allotted(settings.codec, projection, settings.budgets[0]), most)
    for budget in sorted(settings.budgets, reverse=True):
        found, filled = latest.get(budget), allotted(settings.codec, projection, budget)
        if found is None:
            if settings.start == "water-filling":
                amounts = _floored(filled, settings.floor)
            kl = cost(amounts)
            found = Found(budget, amounts, kl, kl, 0, False)
        while not found.ended:
            if settings.start == "full":
                found = _lowered(found, settings, int(filled.sum()), cost)
            else:
                found = _exchanged(found, settings, most, cost)
            yield found
        amounts = found.amounts


def _floored(amounts: Tensor, floor: int) -> Tensor:
    """The same total with at least `floor` everywhere, taken from those that have most; ValueError if that is more."""
    total, raised = int(amounts.sum()), amounts.clamp(min=floor)
    if floor * amounts.numel() > total:
        raise ValueError(f"floor {floor} of {amounts.numel()} heads is more than the budget's {total}")
    for _ in range(int(raised.sum()) - total):
        raised.view(-1)[raised.argmax()] -= 1
    return raised


def _lowered(found: Found, settings: SearchSettings, total: int, cost: Cost) -> Found:
    """Some heads a step lower: those whose step raises the KL least."""
    amounts, left = found.amounts.clone(), int(found.amounts.sum()) - total
    rises = _moved(amounts, -settings.step, amounts - settings.step >= settings.floor, cost)
    count = min(settings.at_once, -(-left // settings.step), int(rises.isfinite().sum()))
    for place in rises.flatten().argsort(stable=True)[:count].tolist():
        step = min(settings.step, left)
        amounts.view(-1)[place] -= step
        left -= step
    return Found(found.budget, amounts, cost(amounts), found.kl_start, found.sweeps + 1, ended=left <= 0 or count == 0)


def _exchanged(found: Found, settings: SearchSettings, most: int, cost: Cost) -> Found:
    """Steps given by some heads to as many others, if that lowers the KL: all that alone look worth it, or fewer."""
    amounts, step = found.amounts, settings.step
    given = _moved(amounts, -step, amounts - step >= settings.floor, cost) - found.kl
    taken = _moved(amounts, step, amounts + step <= most, cost) - found.kl
    givers, takers = given.flatten().argsort(stable=True), taken.flatten().argsort(stable=True)
    worth = given.flatten()[givers] + taken.flatten()[takers] < 0
    count = int(worth.int().cumprod(0).sum())
    while count:
        moved = amounts.clone()
        moved.view(-1)[takers[:count]] += step
        moved.view(-1)[givers[:count]] -= step
        kl = cost(moved)
        if kl < found.kl:
            sweeps = found.sweeps + 1
            return Found(found.budget, moved, kl, found.kl_start, sweeps, ended=sweeps >= settings.sweeps_max)
        count //= 2
    return Found(found.budget, amounts, found.kl, found.kl_start, found.sweeps + 1, ended=True)


def _moved(amounts: Tensor, step: int, may: Tensor, cost: Cost) -> Tensor:
    """KL [kinds, L, H] when one head alone moves by a step; infinite where it may not."""
    found = torch.full(amounts.shape, torch.inf)
    for place in may.flatten().nonzero().flatten().tolist():
        moved = amounts.clone()
        moved.view(-1)[place] += step
        found.view(-1)[place] = cost(moved)
    return found
