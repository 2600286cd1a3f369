"""What each tenant may take. Every server counts what the index told last plus what it took in itself since.

So servers together may go over a quota by what the others take in within one sweep, and by one append each; the rate is
for each server.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import monotonic

from kvstore_server.errors import ResourceExhausted
from kvstore_server.metadata.index import SessionEntry
from kvstore_server.tenants import Quota

RETRY_SECONDS = 5.0


@dataclass
class Usage:
    """Of one tenant: as the index told last, and what this server has added since."""

    sessions: int = 0
    stored_bytes: int = 0
    rate_debt_bytes: float = 0.0
    """Bytes taken in that the rate has not paid for yet."""
    paid_at: float = field(default=0.0)


class Quotas:
    """Refuses with ResourceExhausted (QUOTA), which names the quota and when to try again."""

    def __init__(self, quota_of: Callable[[str], Quota], clock: Callable[[], float] = monotonic) -> None:
        self._quota_of, self._clock = quota_of, clock
        self._usage: dict[str, Usage] = {}

    def measured(self, tenant: str, entries: Iterable[SessionEntry]) -> None:
        """All sessions of the tenant, as the index has them now."""
        usage = self._of(tenant)
        usage.sessions = usage.stored_bytes = 0
        for entry in entries:
            usage.sessions += 1
            usage.stored_bytes += entry.stored_bytes

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

    def created(self, tenant: str) -> None:
        self._of(tenant).sessions += 1

    def received(self, tenant: str, sent_bytes: int) -> None:
        """An append of so many bytes was admitted."""
        if self._quota_of(tenant).append_bytes_per_second_max is not None:
            self._of(tenant).rate_debt_bytes += sent_bytes

    def stored(self, tenant: str, stored_bytes: int) -> None:
        self._of(tenant).stored_bytes += stored_bytes

    def _of(self, tenant: str) -> Usage:
        return self._usage.setdefault(tenant, Usage(paid_at=self._clock()))

    def _debt(self, usage: Usage, rate: int) -> float:
        """Bytes; an append is admitted when there are none, however large it is."""
        now = self._clock()
        usage.rate_debt_bytes = max(0.0, usage.rate_debt_bytes - rate * (now - usage.paid_at))
        usage.paid_at = now
        return usage.rate_debt_bytes
