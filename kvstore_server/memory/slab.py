"""Which bytes of a device's slab are in use: pages of a few sizes, and long runs, from one pool of equal extents.

Only numbers are kept here; the bytes are the caller's. An extent is cut into pages of one size while any of them is in
use, then it is free for any size again.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

ALIGNMENT_BYTES = 512
EXTENT_BYTES = 2 << 20


class SlabFull(Exception):
    """No room for the pages or the run that were asked for."""


class Slab:
    """Offsets in bytes, all multiples of 512. A page has an owner more for each `share`, and is free without any."""

    def __init__(self, size_bytes: int, extent_bytes: int = EXTENT_BYTES) -> None:
        assert extent_bytes % ALIGNMENT_BYTES == 0
        self.extent_bytes = extent_bytes
        self.size_bytes = size_bytes // extent_bytes * extent_bytes
        self._free = set(range(self.size_bytes // extent_bytes))
        self._open: dict[int, dict[int, None]] = defaultdict(dict)  # page size -> offsets of its free pages
        self._pages: dict[int, tuple[int, int]] = {}  # offset -> (page size, owners)
        self._runs: dict[int, int] = {}  # offset -> extents
        self._used = Counter[int]()  # extent -> pages in use

    @property
    def free_bytes(self) -> int:
        """Of extents that no page and no run uses."""
        return len(self._free) * self.extent_bytes

    def take_pages(self, page_bytes: int, count: int) -> list[int]:
        """Offsets of `count` pages with one owner each; SlabFull, changing nothing, if there are not so many."""
        if page_bytes > self.extent_bytes:
            return self._take_large(page_bytes, count)
        available = self._open[page_bytes]
        missing = count - len(available)
        per_extent = self.extent_bytes // page_bytes
        if missing > len(self._free) * per_extent:
            raise SlabFull
        for _ in range(-(-max(0, missing) // per_extent)):
            first = self._free.pop() * self.extent_bytes
            available.update(dict.fromkeys(first + page_bytes * i for i in range(per_extent)))
        taken = [available.popitem()[0] for _ in range(count)]
        for offset in taken:
            self._pages[offset] = (page_bytes, 1)
            self._used[offset // self.extent_bytes] += 1
        return taken

    def share(self, offsets: Iterable[int]) -> None:
        """Gives pages that are in use one more owner."""
        for offset in offsets:
            size, owners = self._pages[offset]
            self._pages[offset] = (size, owners + 1)

    def release(self, offsets: Iterable[int]) -> None:
        """Takes one owner from each page."""
        for offset in offsets:
            size, owners = self._pages[offset]
            if owners > 1:
                self._pages[offset] = (size, owners - 1)
                continue
            del self._pages[offset]
            if offset in self._runs:
                self.release_run(offset)
                continue
            self._open[size][offset] = None
            self._used[offset // self.extent_bytes] -= 1
            if not self._used[offset // self.extent_bytes]:
                self._close(offset // self.extent_bytes, size)

    def take_run(self, size_bytes: int) -> tuple[int, int]:
        """Offset and length of at least `size_bytes` > 0 in one piece; SlabFull if there is none so long."""
        if size_bytes <= self.extent_bytes // 4:
            length = max(ALIGNMENT_BYTES, 1 << (size_bytes - 1).bit_length())
            return self.take_pages(length, 1)[0], length
        count, found = -(-size_bytes // self.extent_bytes), 0
        for extent in range(self.size_bytes // self.extent_bytes):
            found = found + 1 if extent in self._free else 0
            if found == count:
                first = extent - count + 1
                self._free.difference_update(range(first, extent + 1))
                self._runs[first * self.extent_bytes] = count
                return first * self.extent_bytes, count * self.extent_bytes
        raise SlabFull

    def release_run(self, offset: int) -> None:
        if offset not in self._runs:
            self.release([offset])
            return
        first = offset // self.extent_bytes
        self._free.update(range(first, first + self._runs.pop(offset)))

    def _take_large(self, page_bytes: int, count: int) -> list[int]:
        taken = list[int]()
        try:
            for _ in range(count):
                taken.append(self.take_run(page_bytes)[0])
                self._pages[taken[-1]] = (page_bytes, 1)
        except SlabFull:
            self.release(taken)
            raise
        return taken

    def _close(self, extent: int, page_bytes: int) -> None:
        """Gives an extent of which no page is in use back."""
        first = extent * self.extent_bytes
        for offset in range(first, first + self.extent_bytes // page_bytes * page_bytes, page_bytes):
            del self._open[page_bytes][offset]
        del self._used[extent]
        self._free.add(extent)
