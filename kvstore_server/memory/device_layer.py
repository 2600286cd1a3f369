"""One layer of one session on the device: exact rows in one run of the slab, sketches in pages of 256 positions."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstore_codecs.plan import SignPlan
from kvstore_codecs.spec import KINDS, Kind
from kvstore_kernels import DenseRows, Rows, SignRows
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, Pages, SignPages, page_bytes
from kvstore_kernels.paging import Paging
from kvstore_server.memory.resident import Block, Blocks, ResidentSession
from kvstore_server.memory.slab import Slab

VIEWS_MAX = 4
"""Of one layer: ranges and levels that are asked for in turn."""


@dataclass(frozen=True)
class Arena:
    """Device bytes with the account of who uses them."""

    paging: Paging
    bytes: Tensor
    """uint8 on the device; offsets of `slab` count from its start."""
    slab: Slab


@dataclass
class PagedSketches:
    """Those of one epoch, of positions up to `packed`; the first `skipped` pages are none.

    Page i holds what the epoch has of positions [256 i, 256 (i + 1)), whatever is exact, so that forks can share it.
    """

    skipped: int = 0
    pages: list[int] = field(default_factory=list)
    packed: int = 0
    table: Tensor | None = None
    table_pages: int = 0


@dataclass
class KindOnDevice:
    """Rows [0, row_count) in a run; sketches in pages, by the number of their epoch."""

    run: int | None = None
    run_bytes: int = 0
    row_count: int = 0
    sketches: defaultdict[int, PagedSketches] = field(default_factory=lambda: defaultdict(PagedSketches))


class DeviceLayer:
    """Takes what it lacks from the session's host rows, which it does not keep alive. Nothing here waits."""

    def __init__(self, arena: Arena, layer: int) -> None:
        self._arena, self._layer = arena, layer
        self._kinds: dict[Kind, KindOnDevice] = {kind: KindOnDevice() for kind in KINDS}
        self._views: dict[tuple[int, ...], Blocks] = {}

    @property
    def is_loaded(self) -> bool:
        """There are rows to read."""
        return any(own.row_count or any(each.packed for each in own.sketches.values()) for own in self._kinds.values())

    def size_bytes(self, resident: ResidentSession, end: int) -> int:
        """Of positions [0, end) on the device."""
        total = 0
        for kind in KINDS:
            total += _row_bytes(resident) * self._row_count(resident, kind, end)
            for _, plan, first, last in self._paged_ranges(resident, kind, end):
                total += page_bytes(plan.layout) * (-(-last // PAGE_TOKENS) - first // PAGE_TOKENS)
        return total

    def reserve(self, resident: ResidentSession, end: int) -> None:
        """Takes room for positions [0, end); SlabFull leaves what it has taken so far to `release`."""
        self._views.clear()
        for kind, own in self._kinds.items():
            self._reserve_rows(resident, own, self._row_count(resident, kind, end))
            for number, plan, first, last in self._paged_ranges(resident, kind, end):
                if plan.layout.words:
                    sketches = own.sketches[number]
                    sketches.skipped = first // PAGE_TOKENS
                    wanted = -(-last // PAGE_TOKENS) - sketches.skipped - len(sketches.pages)
                    if wanted > 0:
                        sketches.pages += self._arena.slab.take_pages(page_bytes(plan.layout), wanted)

    def load(self, resident: ResidentSession, end: int) -> int:
        """Brings positions [0, end), for which there is room, to the device; how many bytes that took."""
        loaded = 0
        for kind, own in self._kinds.items():
            loaded += self._load_rows(resident, own, kind, self._row_count(resident, kind, end))
            for number, plan, first, last in self._paged_ranges(resident, kind, end):
                if (sketches := own.sketches[number]).packed < last:
                    loaded += self._pack(resident, sketches, kind, plan, first, last)
        if loaded:
            self._views.clear()
        return loaded

    def share(self, parent: "DeviceLayer", end: int) -> int:
        """Takes over the parent's full pages below `end`, which both only read from now on; how many."""
        taken = 0
        for kind, own in self._kinds.items():
            for number, theirs in parent._kinds[kind].sketches.items():
                full, mine = min(end, theirs.packed) // PAGE_TOKENS - theirs.skipped, own.sketches[number]
                if full > 0 and not mine.pages:
                    mine.skipped, mine.pages = theirs.skipped, theirs.pages[:full]
                    mine.packed = (theirs.skipped + full) * PAGE_TOKENS
                    self._arena.slab.share(mine.pages)
                    taken += full
        return taken

    def release(self) -> None:
        self._views.clear()
        for kind, own in self._kinds.items():
            for sketches in own.sketches.values():
                self._arena.slab.release(sketches.pages)
            if own.run is not None:
                self._arena.slab.release_run(own.run)
            self._kinds[kind] = KindOnDevice()

    def blocks(self, resident: ResidentSession, start: int, end: int, levels: dict[Kind, int]) -> Blocks:
        """Positions [start, end), all loaded: exact ones, then those of each epoch. The same ones until rows move."""
        view = self.at_hand(start, end, levels)
        if view is None:
            while len(self._views) >= VIEWS_MAX:
                del self._views[next(iter(self._views))]
            view = self._views[start, end, *levels.values()] = Blocks(self._blocks(resident, start, end, levels))
        return view

    def at_hand(self, start: int, end: int, levels: dict[Kind, int]) -> Blocks | None:
        """What `blocks` answers, if it was asked before."""
        return self._views.get((start, end, *levels.values()))

    def _blocks(self, resident: ResidentSession, start: int, end: int, levels: dict[Kind, int]) -> list[Block]:
        border = min(max(_border(resident, end), start), end)
        exact = [(None, start, border)] if start < border else []
        return [
            Block(first, last, *(self._rows(resident, kind, number, first, last, levels[kind]) for kind in KINDS))
            for number, first, last in [*exact, *resident.sketched_ranges(start, end)]
        ]

    def _row_count(self, resident: ResidentSession, kind: Kind, end: int) -> int:
        """How many of [0, end) are kept as they are."""
        return _border(resident, end) if isinstance(resident.plan_of(self._layer, kind), SignPlan) else end

    def _paged_ranges(
        self, resident: ResidentSession, kind: Kind, end: int
    ) -> Iterator[tuple[int, SignPlan, int, int]]:
        """Epoch, its plan, first position and end of all sketches of [0, end) that lie in pages."""
        for number, first, last in resident.sketched_ranges(0, end):
            plan = resident.plan_of(self._layer, kind, number)
            if isinstance(plan, SignPlan) and self._paged(resident, kind):
                yield number, plan, first, last

    def _paged(self, resident: ResidentSession, kind: Kind) -> bool:
        """Values beside keys that are no sketches are decoded, for which they must come as rows."""
        return kind == "keys" or isinstance(resident.plan_of(self._layer, "keys"), SignPlan)

    def _rows(
        self, resident: ResidentSession, kind: Kind, epoch: int | None, first: int, last: int, level: int
    ) -> Rows | SignPages:
        """`epoch` None: of positions that are exact."""
        own, plan = self._kinds[kind], resident.plan_of(self._layer, kind, epoch or 0)
        if epoch is None or not isinstance(plan, SignPlan):
            return DenseRows(self._dense(resident, own)[first:last])
        level = min(level, len(plan.levels) - 1)
        if not self._paged(resident, kind):
            return SignRows(resident.signs(self._layer, kind, first, last), plan.levels[level])
        table = own.sketches[epoch].table
        assert table is not None
        return SignPages(Pages(self._arena.bytes, table, first, last), plan.levels[level])

    def _dense(self, resident: ResidentSession, own: KindOnDevice) -> Tensor:
        """[capacity, H, D] of the run."""
        shape, dtype = resident.shape, resident.dtype
        if own.run is None:
            return torch.empty(0, shape.kv_heads, shape.head_dim, dtype=dtype, device=self._arena.bytes.device)
        held = self._arena.bytes[own.run : own.run + own.run_bytes].view(dtype)
        width = shape.kv_heads * shape.head_dim
        return held[: len(held) // width * width].view(-1, shape.kv_heads, shape.head_dim)

    def _reserve_rows(self, resident: ResidentSession, own: KindOnDevice, count: int) -> None:
        needed = count * _row_bytes(resident)
        if needed <= own.run_bytes:
            return
        slab, before, old = self._arena.slab, self._dense(resident, own)[: own.row_count], own.run
        # Half as much again when it grows: rows of a raw session come one append at a time.
        own.run, own.run_bytes = slab.take_run(max(needed, own.run_bytes * 3 // 2))
        if old is not None:
            self._dense(resident, own)[: own.row_count] = before
            slab.release_run(old)

    def _load_rows(self, resident: ResidentSession, own: KindOnDevice, kind: Kind, count: int) -> int:
        if count <= own.row_count:
            return 0
        rows = resident.exact_rows(self._layer, kind, own.row_count, count)
        self._dense(resident, own)[own.row_count : count].copy_(rows, non_blocking=True)
        own.row_count = count
        return rows.nbytes

    def _pack(
        self, resident: ResidentSession, own: PagedSketches, kind: Kind, plan: SignPlan, begin: int, end: int
    ) -> int:
        """What is not there yet of an epoch's sketches [begin, end)."""
        first, nbytes = max(begin, own.packed), 0
        table = own.table = self._extended_table(own, end)
        if plan.layout.words:
            signs = resident.signs(self._layer, kind, first, end)
            begun = first % PAGE_TOKENS and first > begin
            pages = Pages(self._arena.bytes, table, first, end)
            self._arena.paging.pack(signs, plan.layout, pages, values=kind == "values", keep=bool(begun))
            nbytes = signs.words.nbytes + signs.scales.nbytes
        own.packed = end  # only now: the device may have had no memory for them
        return nbytes

    def _extended_table(self, own: PagedSketches, end: int) -> Tensor:
        """Where each page lies, in units of 512 bytes; entries of pages that hold nothing are never used."""
        if own.table is not None and len(own.table) * PAGE_TOKENS >= end and own.table_pages == len(own.pages):
            return own.table
        units = [0] * own.skipped + [offset // PAGE_UNIT for offset in own.pages]
        units += [0] * (-(-end // PAGE_TOKENS) - len(units))
        table = self._arena.paging.upload(torch.tensor(units, dtype=torch.int32))
        own.table_pages = len(own.pages)
        return table


def _row_bytes(resident: ResidentSession) -> int:
    """Of one exact position of one kind."""
    return resident.shape.kv_heads * resident.shape.head_dim * resident.dtype.itemsize


def _border(resident: ResidentSession, end: int) -> int:
    """Where exact positions of [0, end) stop."""
    return end if resident.exact_end is None else min(resident.exact_end, end)
