"""Work that waits for the device, in an order that is fair between tenants."""

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

SECONDS_AT_FIRST = 0.001
"""What a piece of a tenant's work is thought to take before one has been run."""
GROWTH_MAX = 8
GAIN = 0.25
"""How fast that follows what is measured: one run that had to compile first must not count for much."""


class HasTenant(Protocol):
    @property
    def tenant(self) -> str: ...

    @property
    def key(self) -> Hashable: ...


W = TypeVar("W", bound=HasTenant)


class Queue(Generic[W]):
    """What one tenant has waiting, and how much of the device it has had."""

    __slots__ = ("seconds_each", "used", "waiting", "weight")

    def __init__(self, weight: int) -> None:
        self.weight, self.waiting = weight, deque[W]()
        self.used = 0.0
        """Seconds of the device over its weight, and never less than what those had who were served meanwhile."""
        self.seconds_each = SECONDS_AT_FIRST

    @property
    def seconds(self) -> float:
        """What all that waits will take."""
        return len(self.waiting) * self.seconds_each


class FairLane(Generic[W]):
    """First come, first served within a tenant; between tenants whoever has had the least for its weight.

    A tenant that comes back does not catch up on what it did not want while it was away. Not thread-safe.
    """

    def __init__(self, weight_of: Callable[[str], int]) -> None:
        self._weight_of = weight_of
        self._queues: dict[str, Queue[W]] = {}
        self._active: dict[str, Queue[W]] = {}
        """Those with work that waits."""
        self._now = 0.0
        """What the tenant had that was served last."""
        self._weights = self._count = 0
        """Of the active tenants, and pieces of work."""

    def __len__(self) -> int:
        return self._count

    def add(self, work: W) -> None:
        self._awake(work.tenant).waiting.append(work)
        self._count += 1

    def first(self) -> W:
        """The work whose turn it is. There must be some."""
        return self._next().waiting[0]

    def take(self, together_max: int) -> list[W]:
        """The same with other work of its key, which is in the lane no longer."""
        queue = self._next()
        self._now = queue.used
        waiting = queue.waiting
        taken = [waiting.popleft()]
        if (key := taken[0].key) is not None and waiting:
            taken += [work for work in waiting if work.key == key][: together_max - 1]
            chosen = set(map(id, taken))
            kept = [work for work in waiting if id(work) not in chosen]
            waiting.clear()
            waiting.extend(kept)
        if not waiting:
            del self._active[taken[0].tenant]
            self._weights -= queue.weight
        self._count -= len(taken)
        return taken

    def put_back(self, taken: list[W]) -> None:
        """Undoes `take`."""
        queue = self._awake(taken[0].tenant)
        queue.waiting.extendleft(reversed(taken))
        self._count += len(taken)

    def clear(self) -> list[W]:
        """Takes everything."""
        everything = [work for queue in self._active.values() for work in queue.waiting]
        for queue in self._active.values():
            queue.waiting.clear()
        self._active.clear()
        self._weights = self._count = 0
        return everything

    def charge(self, tenant: str, pieces: int, seconds: float, usual: bool = True) -> None:
        """So many pieces of the tenant's work had the device for so long; if `usual`, the next will as well."""
        queue = self._queue(tenant)
        queue.used += seconds / queue.weight
        if not usual:
            return
        measured = min(seconds / pieces, GROWTH_MAX * queue.seconds_each)
        queue.seconds_each += GAIN * (measured - queue.seconds_each)

    def wait_seconds(self, tenant: str, before: int) -> float:
        """How long a piece of the tenant's work would probably wait for its turn, with so many of it before."""
        queue = self._queue(tenant)
        own, others = before * queue.seconds_each, [each for each in self._active.values() if each is not queue]
        by_turns = own * (1 + sum(each.weight for each in others) / queue.weight)
        return min(by_turns, own + sum(each.seconds for each in others))

    def wait_seconds_max(self, tenant: str, before: int) -> float:
        """That or more, at less cost and for any thread."""
        queue = self._queue(tenant)
        return before * queue.seconds_each * (1 + self._weights / queue.weight)

    def _next(self) -> Queue[W]:
        if len(self._active) == 1:
            return next(iter(self._active.values()))
        return min(self._active.values(), key=lambda queue: queue.used)

    def _awake(self, tenant: str) -> Queue[W]:
        """The tenant's queue, to which work is about to be added."""
        queue = self._active.get(tenant)
        if queue is None:
            queue = self._active[tenant] = self._queue(tenant)
            queue.used = max(queue.used, self._now)
            self._weights += queue.weight
        return queue

    def _queue(self, tenant: str) -> Queue[W]:
        if tenant not in self._queues:
            self._queues[tenant] = Queue(self._weight_of(tenant))
        return self._queues[tenant]
