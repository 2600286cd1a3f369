"""One session's rows in host memory, as the ops read them."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from kvstore_codecs.plan import CodecPlan, DensePlan, KindPlan, ProjectedPlan, SignPlan
from kvstore_codecs.projected import ProjectedRows, StoredRows
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS, Kind, ModelShape
from kvstore_kernels import DenseRows, SignRows, Signs, as_torch_dtype
from kvstore_kernels.cuda.pages import SignPages
from kvstore_server.memory.growing import Allocate, GrowingRows, pageable
from kvstore_server.memory.square_sums import SquareSums

AppendRows = Sequence[tuple[KindRows, KindRows]]
"""Keys and values of each layer of one append."""


@dataclass(frozen=True)
class Block:
    """Positions [start, end) of one layer, stored one way, in host memory or on the device."""

    start: int
    end: int
    keys: StoredRows | SignPages
    values: StoredRows | SignPages


class Blocks(list[Block]):
    """Blocks of one layer in the order of their positions."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(blocks)
        self.kept: dict[Any, Any] = {}
        """What a backend keeps for exactly these rows, where they are."""


@dataclass(frozen=True)
class Epoch:
    """Sketches from position `start` on are those of `plan`, up to the next epoch."""

    start: int
    plan: CodecPlan


class KindStore:
    """One layer and kind: exact rows (all of them where the plan is dense), then packed signs, epoch by epoch."""

    def __init__(self, shape: ModelShape, allocate: Allocate) -> None:
        self._allocate = allocate
        self.rows = GrowingRows((shape.kv_heads, shape.head_dim), as_torch_dtype(shape.dtype), allocate)
        self._signs = dict[int, tuple[GrowingRows, GrowingRows]]()
        self._squares = dict[int, SquareSums]()

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + sum(part.nbytes for parts in self._signs.values() for part in parts)

    def make_room(self, kind: KindRows, epoch: int) -> None:
        """All of `extend` that memory may lack for."""
        for rows, tensor in self._parts(kind, epoch):
            rows.make_room(len(tensor))

    def extend(self, kind: KindRows, epoch: int) -> None:
        for rows, tensor in self._parts(kind, epoch):
            rows.extend(tensor)

    def _parts(self, kind: KindRows, epoch: int) -> list[tuple[GrowingRows, Tensor]]:
        """What each tensor is added to."""
        if kind.signs is None:
            return [(self.rows, kind.rows)]
        tensors = kind.signs.words, kind.signs.scales
        if epoch not in self._signs:
            words, scales = (GrowingRows(tensor.shape[1:], tensor.dtype, self._allocate) for tensor in tensors)
            self._signs[epoch] = words, scales
        return [(self.rows, kind.rows), *zip(self._signs[epoch], tensors, strict=True)]

    def sketched(self, epoch: int, start: int, end: int) -> Signs:
        """Positions count from the epoch's first."""
        words, scales = self._signs[epoch]
        return Signs(words.between(start, end), scales.between(start, end))

    def mean_squares(self, epoch: int, plan: SignPlan, count: int) -> Tensor:
        """float64 [H, G]: the mean of alpha^2 over the first `count` > 0 sketches of an epoch."""
        if epoch not in self._squares:
            self._squares[epoch] = SquareSums(plan.layout)
        return self._squares[epoch].mean(self.sketched(epoch, 0, count).scales, count)


class ResidentSession:
    """The rows of positions [0, length) of one session. Readers may hold views while it grows.

    Positions below `exact_end` are exact in every layer; None: nothing is fitted yet, so all of them are.
    """

    def __init__(self, shape: ModelShape, allocate: Allocate = pageable) -> None:
        self.shape = shape
        self.epochs: tuple[Epoch, ...] = ()
        self.max_positions: Mapping[str, int] = {}
        """Below which positions each projection, by its sha256, was calibrated."""
        self.length = 0
        self.parent: weakref.ref[ResidentSession] | None = None
        """The session that positions [0, shared_end) were forked from, if its rows were loaded too."""
        self.shared_end = 0
        self.facts: dict[tuple[str, int], Any] = {}
        """What every query of a layer looks up in the codec, once it is fitted."""
        self._writing = Lock()
        self._layers = [{kind: KindStore(shape, allocate) for kind in KINDS} for _ in range(shape.layers)]

    @property
    def dtype(self) -> torch.dtype:
        return as_torch_dtype(self.shape.dtype)

    @property
    def nbytes(self) -> int:
        """Of its rows and of plans that no other session has: those with bases of its own."""
        rows = sum(store.nbytes for layer in self._layers for store in layer.values())
        return rows + sum(epoch.plan.own_bytes for epoch in self.epochs)

    @property
    def plan(self) -> CodecPlan | None:
        """The newest; None before the fit."""
        return self.epochs[-1].plan if self.epochs else None

    @property
    def exact_end(self) -> int | None:
        return self.epochs[0].start if self.epochs else None

    def adopt(self, epochs: Sequence[Epoch]) -> None:
        """Rows at or above the first epoch's start come as its plan says; below it all are exact."""
        self.facts.clear()
        self.epochs = tuple(epochs)

    def extend(self, start: int, rows: AppendRows, tokens: int) -> bool:
        """Adds positions [start, start + tokens); False, changing nothing, if `start` is not the length.

        A cancelled load goes on in its thread, so two writers may meet here.
        """
        with self._writing:
            if start != self.length:
                return False
            self._append(rows, self.epoch_of(start))
            self.length += tokens
            return True

    def epoch_of(self, start: int) -> int:
        """The number of the epoch that an append at `start` is of; 0 too where all is exact."""
        return max(0, sum(epoch.start <= start for epoch in self.epochs) - 1)

    def _append(self, rows: AppendRows, epoch: int) -> None:
        parts = [
            (layer[kind], part)
            for layer, pair in zip(self._layers, rows, strict=True)
            for kind, part in zip(KINDS, pair, strict=True)
        ]
        for store, part in parts:  # all of them first: what fails later would leave some longer than others
            store.make_room(part, epoch)
        for store, part in parts:
            store.extend(part, epoch)

    def blocks(self, layer: int, start: int, end: int, levels: dict[Kind, int]) -> Iterator[Block]:
        """Positions [start, end) of `layer` at a level for each kind: exact ones first, then those of each epoch."""
        border = end if self.exact_end is None else min(max(self.exact_end, start), end)
        if start < border:
            keys, values = (DenseRows(self._layers[layer][kind].rows.between(start, border)) for kind in KINDS)
            yield Block(start, border, keys, values)
        for number, first, last in self.sketched_ranges(start, end):
            keys, values = (self._compressed(layer, kind, number, first, last, levels[kind]) for kind in KINDS)
            yield Block(first, last, keys, values)

    def sketched_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, first position, end) of each epoch within [start, end)."""
        ends = [*(epoch.start for epoch in self.epochs[1:]), end]
        for number, (epoch, last) in enumerate(zip(self.epochs, ends, strict=False)):
            if max(epoch.start, start) < min(last, end):
                yield number, max(epoch.start, start), min(last, end)

    def plan_of(self, layer: int, kind: Kind, epoch: int = -1) -> KindPlan:
        """Of an epoch, the newest by default; all have the same kinds of plans and as many levels."""
        return self.epochs[epoch].plan.of(layer, kind) if self.epochs else DensePlan()

    def exact_rows(self, layer: int, kind: Kind, start: int, end: int) -> Tensor:
        """[end - start, H, D] in the session's dtype, of positions that are stored exactly."""
        return self._layers[layer][kind].rows.between(start, end)

    def signs(self, layer: int, kind: Kind, start: int, end: int) -> Signs:
        """Packed sketches of positions [start, end), all of one epoch."""
        number = self.epoch_of(start)
        first = self.epochs[number].start
        return self._layers[layer][kind].sketched(number, start - first, end - first)

    def mean_squares(self, layer: int, number: int, end: int) -> Tensor:
        """float64 [H, G]: the mean of alpha^2 over the sketched keys of an epoch up to position `end`, not none."""
        plan = self.plan_of(layer, "keys", number)
        assert isinstance(plan, SignPlan)
        return self._layers[layer]["keys"].mean_squares(number, plan, end - self.epochs[number].start)

    def _compressed(self, layer: int, kind: Kind, number: int, start: int, end: int, level: int) -> StoredRows:
        plan = self.plan_of(layer, kind, number)
        if isinstance(plan, SignPlan):
            return SignRows(self.signs(layer, kind, start, end), plan.levels[min(level, len(plan.levels) - 1)])
        if isinstance(plan, ProjectedPlan):
            return ProjectedRows(self.signs(layer, kind, start, end).scales, plan)
        return DenseRows(self.exact_rows(layer, kind, start, end))
