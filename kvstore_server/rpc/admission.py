"""Who may come in: nobody while the server drains, and only so many at a time, shared fairly between tenants.

Everything is decided when a call or step comes, by a few comparisons and without waiting. Health checks, reflection and
metrics do not come here.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from kvstore_server.errors import ResourceExhausted, Unavailable
from kvstore_server.limits import Limits
from kvstore_server.scheduling.pool import UNBOUNDED, Bound, Pool, Share

BUSY_RETRY_SECONDS = 0.05
STEP_RETRY_SECONDS = 0.01
APPEND_RETRY_SECONDS = 0.2
POOL_OF = {
    "Score": "queries",
    "TopK": "queries",
    "Fetch": "fetches",
    "Prefetch": "fetches",
    "PutProjection": "projections",
    "GetProjection": "projections",
    "Attend": "attend_streams",
}
"""The others share `calls`."""


class Admission:
    """`wait_seconds(tenant, n, enough)`: a query's wait for the device with n of its tenant's before it."""

    def __init__(
        self,
        limits: Limits,
        *,
        weight_of: Callable[[str], int],
        has_tenants: bool,
        wait_seconds: Callable[[str, int, float], float],
    ) -> None:
        over_free = limits.tenant_over_free_max if has_tenants else float("inf")

        def pool(places: Bound, size: Bound = UNBOUNDED, retry: float = BUSY_RETRY_SECONDS) -> Pool:
            return Pool(places, size, over_free=over_free, weight_of=weight_of, retry_after_seconds=retry)

        self.pools = {
            "calls": pool(Bound("calls_inflight_max", limits.calls_inflight_max)),
            "queries": pool(
                Bound("queries_inflight_max", limits.queries_inflight_max),
                Bound("queries_inflight_bytes_max", limits.queries_inflight_bytes_max),
            ),
            "fetches": pool(Bound("fetches_inflight_max", limits.fetches_inflight_max)),
            "projections": pool(Bound("projections_inflight_max", limits.projections_inflight_max)),
            "attend_streams": pool(Bound("attend_streams_max", limits.attend_streams_max)),
            "steps": pool(
                Bound("steps_inflight_max", limits.steps_inflight_max),
                Bound("steps_inflight_bytes_max", limits.steps_inflight_bytes_max),
                STEP_RETRY_SECONDS,
            ),
            "appends": pool(
                Bound("appends_inflight_max", limits.appends_inflight_max),
                Bound("appends_inflight_bytes_max", limits.appends_inflight_bytes_max),
                APPEND_RETRY_SECONDS,
            ),
        }
        self._wait_seconds, self._wait_seconds_max = wait_seconds, limits.query_wait_ms_max / 1000
        self.draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0

    @contextmanager
    def call(self, method: str, tenant: str, deadline: float) -> Iterator["Place"]:
        """A place for one call; Unavailable while draining, ResourceExhausted when there is none for the tenant."""
        if self.draining.is_set():
            raise Unavailable("DRAINING", "the server is draining")
        pool = POOL_OF.get(method, "calls")
        if pool == "queries":
            self.turns(tenant).check(deadline)
        place = Place(self.pools[pool].share(tenant))
        self.in_flight += 1
        self._idle.clear()
        try:
            yield place
        finally:
            place.give()
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def turns(self, tenant: str) -> "Turns":
        shares = [self.pools[name].share(tenant) for name in ("queries", "steps")]
        return Turns(tenant, shares, self._wait_seconds_max, self._wait_seconds)

    async def idle(self) -> None:
        """Returns when no call is in flight."""
        await self._idle.wait()


@dataclass(frozen=True, slots=True)
class Turns:
    """When a tenant's next query would have the device."""

    tenant: str
    held: Sequence[Share]
    """Queries and steps, which count from their admission on: they may still be on their way to the device."""
    seconds_max: float
    wait_seconds: Callable[[str, int, float], float]

    def check(self, deadline: float) -> None:
        """ResourceExhausted if a query would wait too long, or beyond its deadline."""
        before = sum([share.places for share in self.held]) - 1
        if before <= 0:  # one is not waited for but run
            return
        enough = min(self.seconds_max, deadline - monotonic())
        wait = self.wait_seconds(self.tenant, before, enough)
        if wait > enough:
            limit = round(self.seconds_max * 1000)
            text = f"the device is free for this tenant in {wait:.2f} s; query_wait_ms_max is {limit}"
            retry = max(wait, BUSY_RETRY_SECONDS)
            raise ResourceExhausted("BUSY", text, retry, bound="query_wait_ms_max", limit=limit)


class Place:
    """What one call holds."""

    def __init__(self, share: Share) -> None:
        share.take()
        self._share, self._size = share, 0

    def grow(self, size: int) -> None:
        """Once the request is here: so many bytes of it."""
        self._share.grow(size)
        self._size += size

    def give(self) -> None:
        self._share.give(self._size)
