"""One session's rows in host memory, as the ops read them."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
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


class KindStore:
    """One layer and kind: exact rows (all of them where the plan is dense), then packed signs."""

    def __init__(self, shape: ModelShape, allocate: Allocate) -> None:
        self._allocate = allocate
        self.rows = GrowingRows((shape.kv_heads, shape.head_dim), as_torch_dtype(shape.dtype), allocate)
        self.words: GrowingRows | None = None
        self.scales: GrowingRows | None = None
        self._squares: SquareSums | None = None

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + sum(part.nbytes for part in (self.words, self.scales) if part is not None)

    def extend(self, kind: KindRows) -> None:
        self.rows.extend(kind.rows)
        if kind.signs is not None:
            if self.words is None or self.scales is None:
                self.words = GrowingRows(kind.signs.words.shape[1:], kind.signs.words.dtype, self._allocate)
                self.scales = GrowingRows(kind.signs.scales.shape[1:], kind.signs.scales.dtype, self._allocate)
            self.words.extend(kind.signs.words)
            self.scales.extend(kind.signs.scales)

    def sketched(self, start: int, end: int) -> Signs:
        if self.words is None or self.scales is None:
            raise LookupError("no signs are stored here")
        return Signs(self.words.between(start, end), self.scales.between(start, end))

    def mean_squares(self, plan: SignPlan, count: int) -> Tensor:
        """float64 [H, G]: the mean of alpha^2 over the first `count` > 0 sketches."""
        if self._squares is None:
            self._squares = SquareSums(plan.layout)
        return self._squares.mean(self.sketched(0, count).scales, count)


class ResidentSession:
    """The rows of positions [0, length) of one session. Readers may hold views while it grows.

    Positions below `exact_end` are exact in every layer; None: nothing is fitted yet, so all of them are.
    """

    def __init__(self, shape: ModelShape, allocate: Allocate = pageable) -> None:
        self.shape = shape
        self.plan: CodecPlan | None = None
        self.exact_end: int | None = None
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
        return sum(store.nbytes for layer in self._layers for store in layer.values())

    def adopt(self, plan: CodecPlan, exact_end: int) -> None:
        """Rows at or above `exact_end` come as the plan says; before this, all are exact."""
        if self.plan is not plan:
            self.facts.clear()
        self.plan, self.exact_end = plan, exact_end

    def extend(self, start: int, rows: AppendRows, tokens: int) -> bool:
        """Adds positions [start, start + tokens); False, changing nothing, if `start` is not the length.

        A cancelled load goes on in its thread, so two writers may meet here.
        """
        with self._writing:
            if start != self.length:
                return False
            self._append(rows)
            self.length += tokens
            return True

    def _append(self, rows: AppendRows) -> None:
        for layer, pair in zip(self._layers, rows, strict=True):
            for kind, part in zip(KINDS, pair, strict=True):
                layer[kind].extend(part)

    def blocks(self, layer: int, start: int, end: int, levels: dict[Kind, int]) -> Iterator[Block]:
        """Positions [start, end) of `layer` at a level for each kind: exact ones first, then sketched ones."""
        border = end if self.exact_end is None else min(max(self.exact_end, start), end)
        if start < border:
            keys, values = (DenseRows(self._layers[layer][kind].rows.between(start, border)) for kind in KINDS)
            yield Block(start, border, keys, values)
        if border < end:
            keys, values = (self._compressed(layer, kind, border, end, levels[kind]) for kind in KINDS)
            yield Block(border, end, keys, values)

    def plan_of(self, layer: int, kind: Kind) -> KindPlan:
        return DensePlan() if self.plan is None else self.plan.of(layer, kind)

    def exact_rows(self, layer: int, kind: Kind, start: int, end: int) -> Tensor:
        """[end - start, H, D] in the session's dtype, of positions that are stored exactly."""
        return self._layers[layer][kind].rows.between(start, end)

    def signs(self, layer: int, kind: Kind, start: int, end: int) -> Signs:
        """Packed sketches of positions [start, end), all at or above `exact_end`."""
        assert self.exact_end is not None
        return self._layers[layer][kind].sketched(start - self.exact_end, end - self.exact_end)

    def mean_squares(self, layer: int, end: int) -> Tensor:
        """float64 [H, G]: the mean of alpha^2 over the sketched keys of positions [exact_end, end), not none."""
        plan, exact_end = self.plan_of(layer, "keys"), self.exact_end
        assert isinstance(plan, SignPlan)
        assert exact_end is not None
        return self._layers[layer]["keys"].mean_squares(plan, end - exact_end)

    def _compressed(self, layer: int, kind: Kind, start: int, end: int, level: int) -> StoredRows:
        plan = self.plan_of(layer, kind)
        if isinstance(plan, SignPlan):
            return SignRows(self.signs(layer, kind, start, end), plan.levels[min(level, len(plan.levels) - 1)])
        if isinstance(plan, ProjectedPlan):
            return ProjectedRows(self.signs(layer, kind, start, end).scales, plan)
        return DenseRows(self.exact_rows(layer, kind, start, end))
