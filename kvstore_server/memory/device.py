"""Which sessions are on the device: whole ones while they fit, the least recently used leaving for others."""

import weakref
from collections import Counter
from collections.abc import Callable
from itertools import count

from kvstore_codecs.spec import Kind
from kvstore_kernels.paging import Paging
from kvstore_server.errors import ResourceExhausted
from kvstore_server.memory.device_layer import Arena, DeviceLayer
from kvstore_server.memory.resident import Blocks, ResidentSession
from kvstore_server.memory.slab import Slab, SlabFull

RETRY_AFTER_SECONDS = 1.0
EVENTS = {
    "admitted": "Sessions brought to the device",
    "evicted": "Sessions that left the device for others",
    "streamed_layers": "Layers brought to the staging area",
    "shared_pages": "Pages that forks took over from their parents",
    "loaded_bytes": "Bytes brought to the device",
}
"""What `counts` counts."""


class DeviceSession:
    """Room for positions [0, end) of all layers; each layer is loaded by the first query that reads it."""

    def __init__(self, arena: Arena, layers: int) -> None:
        self.layers = [DeviceLayer(arena, layer) for layer in range(layers)]
        self.end = 0
        self.used = 0

    def size_bytes(self, resident: ResidentSession, end: int) -> int:
        return sum(layer.size_bytes(resident, end) for layer in self.layers)

    def reserve(self, resident: ResidentSession, end: int) -> None:
        for layer in self.layers:
            layer.reserve(resident, end)
        self.end = end

    def release(self) -> None:
        for layer in self.layers:
            layer.release()
        self.end = 0


class DeviceMemory:
    """One slab and a staging area. Only who may launch work calls it.

    Host rows stay where they are, so a session leaves the device by giving its pages back. One that does not fit beside
    none is streamed: a layer is brought into the staging area for each query, unless it is there already.
    """

    def __init__(self, paging: Paging, size_bytes: int, staging_bytes: int) -> None:
        self._arena = Arena(paging, paging.allocate(size_bytes), Slab(size_bytes))
        self._staging = Arena(paging, paging.allocate(staging_bytes), Slab(staging_bytes))
        self._staged: tuple[weakref.ref[ResidentSession], int, DeviceLayer] | None = None
        self._sessions: dict[int, DeviceSession] = {}
        self._gone: list[int] = []
        self._clock = count(1)
        self.counts = Counter[str]()
        self.first_loads = 0
        """Layers that queries brought here, and for which nothing had to leave: the next query finds them."""

    @property
    def size_bytes(self) -> int:
        return self._arena.slab.size_bytes

    @property
    def used_bytes(self) -> int:
        return self._arena.slab.size_bytes - self._arena.slab.free_bytes

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    def blocks(self, resident: ResidentSession, layer: int, start: int, end: int, levels: dict[Kind, int]) -> Blocks:
        """Positions [start, end) of `layer` on the device; ResourceExhausted if the layer alone does not fit."""
        self._forget_gone()
        evicted = self.counts["evicted"]
        session = self._admitted(resident, end)
        if session is None:
            return self._streamed(resident, layer, end).blocks(resident, start, end, levels)
        own = session.layers[layer]
        if not own.is_loaded and evicted == self.counts["evicted"]:
            self.first_loads += 1
        self.counts["loaded_bytes"] += own.load(resident, end)
        return own.blocks(resident, start, end, levels)

    def at_hand(
        self, resident: ResidentSession, layer: int, start: int, end: int, levels: dict[Kind, int]
    ) -> Blocks | None:
        """As `blocks`, if they were asked for before and lie there still; None otherwise."""
        self._forget_gone()
        session = self._sessions.get(id(resident))
        if session is None or session.end < end:
            return None
        session.used = next(self._clock)
        return session.layers[layer].at_hand(start, end, levels)

    def prefetch(self, resident: ResidentSession, layer: int, end: int) -> None:
        """Loads one layer ahead of its first query; does nothing for a session that has to be streamed."""
        self._forget_gone()
        if (session := self._admitted(resident, end)) is not None:
            self.counts["loaded_bytes"] += session.layers[layer].load(resident, end)

    def _admitted(self, resident: ResidentSession, end: int) -> DeviceSession | None:
        """The session with room for [0, end); None if it does not fit even alone."""
        key = id(resident)
        session = self._sessions.get(key)
        if session is None:
            session = DeviceSession(self._arena, resident.shape.layers)
            if session.size_bytes(resident, end) > self._arena.slab.size_bytes:
                return None
            self._sessions[key] = session
            weakref.finalize(resident, self._gone.append, key)
            self._share_with_parent(session, resident)
            self.counts["admitted"] += 1
        session.used = next(self._clock)
        if session.end < end and not self._with_room(session, lambda: session.reserve(resident, end)):
            self._evict(key)
            return None
        return session

    def _with_room(self, keep: DeviceSession, reserve: Callable[[], None]) -> bool:
        """Whether `reserve` succeeds, others leaving for it one by one."""
        while True:
            try:
                reserve()
                return True
            except SlabFull:
                others = [key for key, session in self._sessions.items() if session is not keep]
                if not others:
                    return False
                self._evict(min(others, key=lambda key: self._sessions[key].used))

    def _evict(self, key: int) -> None:
        self._sessions.pop(key).release()
        self.counts["evicted"] += 1

    def _share_with_parent(self, session: DeviceSession, resident: ResidentSession) -> None:
        parent = None if resident.parent is None else resident.parent()
        theirs = None if parent is None else self._sessions.get(id(parent))
        if theirs is None or parent is None or parent.exact_end != resident.exact_end:
            return
        for own, other in zip(session.layers, theirs.layers, strict=True):
            self.counts["shared_pages"] += own.share(other, resident.shared_end)

    def _streamed(self, resident: ResidentSession, layer: int, end: int) -> DeviceLayer:
        if self._staged is not None:
            of, staged_layer, staged = self._staged
            if of() is not resident or staged_layer != layer:
                staged.release()
                self._staged = None
        if self._staged is None:
            self._staged = (weakref.ref(resident), layer, DeviceLayer(self._staging, layer))
            self.counts["streamed_layers"] += 1
        staged = self._staged[2]
        try:
            staged.reserve(resident, end)
        except SlabFull:
            staged.release()
            self._staged = None
            limit = self._staging.slab.size_bytes
            text = f"one layer of {end} tokens does not fit the device's {limit} staging bytes"
            raise ResourceExhausted("DEVICE_MEMORY", text, RETRY_AFTER_SECONDS, limit=limit) from None
        self.counts["loaded_bytes"] += staged.load(resident, end)
        return staged

    def _forget_gone(self) -> None:
        """Gives back what sessions held that the host has dropped."""
        while self._gone:
            if (session := self._sessions.pop(self._gone.pop(), None)) is not None:
                session.release()
