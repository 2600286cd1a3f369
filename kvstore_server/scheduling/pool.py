"""Places and bytes that tenants share: one may take much while there is room, and never the last from the others."""

from collections.abc import Callable
from dataclasses import dataclass

from kvstore_server.errors import ResourceExhausted


@dataclass(frozen=True)
class Bound:
    """A limit by its name."""

    name: str
    value: float


UNBOUNDED = Bound("", float("inf"))


class Pool:
    """So many places, and so many bytes in all of them. Only the event loop calls it; nobody waits for a place.

    A tenant is given a place while it holds at most `over_free` times its weight what is free then, and bytes likewise.
    With an `over_free` of 4 one that wants everything gets 4/5 of it, n that do get 4 / (4 n + 1) each, and there is
    always room for one that comes.
    """

    def __init__(
        self,
        places: Bound,
        size: Bound = UNBOUNDED,
        *,
        over_free: float = float("inf"),
        weight_of: Callable[[str], int] = lambda _: 1,
        retry_after_seconds: float = 0.05,
    ) -> None:
        self.places, self.size = places, size
        self.free_places, self.free_bytes = places.value, size.value
        self._over_free, self._weight_of, self._retry_after_seconds = over_free, weight_of, retry_after_seconds
        self._shares: dict[str, Share] = {}

    @property
    def held(self) -> float:
        """Places that are taken."""
        return self.places.value - self.free_places

    def share(self, tenant: str) -> "Share":
        if tenant not in self._shares:
            self._shares[tenant] = Share(self, self._over_free * self._weight_of(tenant))
        return self._shares[tenant]

    def refusal(self, bound: Bound) -> ResourceExhausted:
        text = f"no more of {bound.name} {bound.value:.0f} is free for this tenant now"
        return ResourceExhausted("BUSY", text, self._retry_after_seconds, bound=bound.name, limit=f"{bound.value:.0f}")


class Share:
    """What one tenant holds of a pool."""

    __slots__ = ("_pool", "_reach", "_size", "places")

    def __init__(self, pool: Pool, reach: float) -> None:
        self._pool, self._reach = pool, reach
        self.places = self._size = 0

    def take(self, size: int = 0) -> None:
        """One place with so many bytes; ResourceExhausted, which names the bound."""
        pool = self._pool
        free = pool.free_places - 1
        if free < 0 or self.places > self._reach * free:
            raise pool.refusal(pool.places)
        self.grow(size)
        self.places += 1
        pool.free_places = free

    def grow(self, size: int) -> None:
        """So many bytes more."""
        pool = self._pool
        free = pool.free_bytes - size
        if free < 0 or self._size > self._reach * free:
            raise pool.refusal(pool.size)
        self._size += size
        pool.free_bytes = free

    def give(self, size: int = 0) -> None:
        """Back one place with so many bytes."""
        pool = self._pool
        self.places -= 1
        self._size -= size
        pool.free_places += 1
        pool.free_bytes += size
