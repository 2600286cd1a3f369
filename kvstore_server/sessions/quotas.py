"""What each tenant may take. Every server counts what the last census told plus what it took in itself since.

So servers together may go over a quota by what the others take in within one sweep, and by one append each; the rate is
for each server. Counting something twice would be worse: a refusal without a reason.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from kvstore_server.errors import ResourceExhausted
from kvstore_server.metadata.index import Holdings, SessionEntry
from kvstore_server.tenants import Quota

RETRY_SECONDS = 5.0


class Added(NamedTuple):
    """By this server; `at` is of its running clock."""

    at: float
    name: str
    version: tuple[int, int]
    """Of the session's entry since then."""
    sessions: int
    stored_bytes: int


@dataclass
class Usage:
    """Of one tenant: as the last census told, and what this server has added since."""

    sessions: int = 0
    stored_bytes: int = 0
    added: deque[Added] = field(default_factory=deque)
    """Within the last `remembered_seconds`: of which a census that another server took may know nothing."""
    rate_debt_bytes: float = 0.0
    """Bytes taken in that the rate has not paid for yet."""
    paid_at: float = field(default=0.0)


class Quotas:
    """Refuses with ResourceExhausted (QUOTA), which names the quota and when to try again."""

    def __init__(
        self, quota_of: Callable[[str], Quota], remembered_seconds: float, clock: Callable[[], float] = monotonic
    ) -> None:
        """What was added longer ago than `remembered_seconds` is in every census."""
        self._quota_of, self._remembered_seconds, self._clock = quota_of, remembered_seconds, clock
        self._usage: dict[str, Usage] = {}

    def measured(
        self, tenant: str, found: Holdings, age_seconds: float = 0.0, listed: Iterable[SessionEntry] = ()
    ) -> None:
        """All sessions of the tenant, as the index had them so long ago or, if they are `listed`, since."""
        usage, since = self._of(tenant), self._clock() - age_seconds
        versions = {entry.name: entry.version for entry in listed}
        added = [each for each in usage.added if each.at > since and versions.get(each.name, (-1, 0)) < each.version]
        usage.sessions = found.sessions + sum(each.sessions for each in added)
        usage.stored_bytes = found.stored_bytes + sum(each.stored_bytes for each in added)

    def session_refusal(self, tenant: str) -> ResourceExhausted | None:
        """Why one more session is too many, if it is."""
        limit = self._quota_of(tenant).sessions_max
        if limit is None or self._of(tenant).sessions < limit:
            return None
        return ResourceExhausted(
            "QUOTA", f"{limit} sessions are there", RETRY_SECONDS, quota="sessions_max", limit=limit
        )

    def append_refusal(self, tenant: str) -> ResourceExhausted | None:
        """Why nothing more can be appended now, if so."""
        usage, quota = self._of(tenant), self._quota_of(tenant)
        limit = quota.stored_bytes_max
        if limit is not None and usage.stored_bytes >= limit:
            text = f"{limit} bytes are stored"
            return ResourceExhausted("QUOTA", text, RETRY_SECONDS, quota="stored_bytes_max", limit=limit)
        rate = quota.append_bytes_per_second_max
        if rate is not None and (debt := self._debt(usage, rate)) > 0:
            text = f"more than {rate} bytes a second are appended"
            return ResourceExhausted("QUOTA", text, debt / rate, quota="append_bytes_per_second_max", limit=rate)
        return None

    def created(self, entry: SessionEntry) -> None:
        """A session, and what the index is told of it."""
        self._add(entry, sessions=1)

    def received(self, tenant: str, sent_bytes: int) -> None:
        """An append of so many bytes was admitted."""
        if self._quota_of(tenant).append_bytes_per_second_max is not None:
            self._of(tenant).rate_debt_bytes += sent_bytes

    def stored(self, entry: SessionEntry, stored_bytes: int) -> None:
        """So much of a session, and what the index is told of it now."""
        self._add(entry, stored_bytes=stored_bytes)

    def _add(self, entry: SessionEntry, *, sessions: int = 0, stored_bytes: int = 0) -> None:
        usage, now = self._of(entry.tenant), self._clock()
        usage.sessions += sessions
        usage.stored_bytes += stored_bytes
        usage.added.append(Added(now, entry.name, entry.version, sessions, stored_bytes))
        while usage.added[0].at < now - self._remembered_seconds:
            usage.added.popleft()

    def _of(self, tenant: str) -> Usage:
        return self._usage.setdefault(tenant, Usage(paid_at=self._clock()))

    def _debt(self, usage: Usage, rate: int) -> float:
        """Bytes; an append is admitted when there are none, however large it is."""
        now = self._clock()
        usage.rate_debt_bytes = max(0.0, usage.rate_debt_bytes - rate * (now - usage.paid_at))
        usage.paid_at = now
        return usage.rate_debt_bytes
