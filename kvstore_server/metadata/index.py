"""The seam to the index: what is known of sessions and can be rebuilt from the store, and news of their growth."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from kvstore_server.limits import Name

REMOVED_KEPT_SECONDS = 3_600
"""How long a removed generation is remembered, so that a late put of it does not bring it back."""

REPLICA_KEPT_SECONDS = 300.0
UNIX_SECONDS_MAX = 2.0**53
PREFIX_CANDIDATES = 4

Generation = Annotated[str, Field(pattern="^[0-9]{1,15}$")]
Whole = Annotated[int, Field(ge=0, le=2**53)]
UnixSeconds = Annotated[float, Field(ge=0, le=UNIX_SECONDS_MAX)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SessionEntry(_Record):
    """What the index knows about one session. The store decides; this may be behind."""

    tenant: Name
    name: Name
    generation: Generation
    length: Whole
    stored_bytes: Whole
    raw_bytes: Whole
    ttl_seconds: Annotated[float, Field(gt=0)] | None
    pinned: bool
    model_fingerprint: Annotated[str, Field(max_length=256)]
    created_unix_seconds: UnixSeconds
    last_used_unix_seconds: UnixSeconds

    @property
    def version(self) -> tuple[int, int]:
        """Never falls: a later generation or, within one, a greater length."""
        return int(self.generation), self.length


class PrefixEntry(_Record):
    """A session whose positions [0, end) have the token ids that a label stands for, if the store agrees."""

    session: Name
    generation: Generation
    end: Whole


class ReplicaEntry(_Record):
    """A server over the same store, as it described itself when it was seen last."""

    name: Annotated[str, Field(min_length=1, max_length=300)]
    """Host and port."""
    version: Annotated[str, Field(max_length=100)]
    device: Annotated[str, Field(max_length=100)]
    state: Annotated[str, Field(max_length=20)]
    seen_unix_seconds: UnixSeconds


class Holdings(_Record):
    """Sessions together; tokens that forks share count for each of them."""

    sessions: Whole = 0
    tokens: Whole = 0
    stored_bytes: Whole = 0
    raw_bytes: Whole = 0

    @classmethod
    def of(cls, entries: Sequence[SessionEntry]) -> "Holdings":
        return cls(
            sessions=len(entries),
            tokens=sum(entry.length for entry in entries),
            stored_bytes=sum(entry.stored_bytes for entry in entries),
            raw_bytes=sum(entry.raw_bytes for entry in entries),
        )


class Census(_Record):
    """All sessions as one server found them, so that the others need not list them too."""

    taken_by: Annotated[str, Field(max_length=100)]
    age_seconds: Annotated[float, Field(ge=0)]
    """Since it began to be taken."""
    kept_seconds: Annotated[float, Field(gt=0)]
    """An index forgets it then."""
    tenants: dict[Name, Holdings]
    largest: tuple[SessionEntry, ...]
    """Some, by stored bytes."""

    @property
    def total(self) -> Holdings:
        fields = Holdings.model_fields
        return Holdings(**{name: sum(getattr(each, name) for each in self.tenants.values()) for name in fields})

    def later(self, seconds: float) -> "Census":
        return self.model_copy(update={"age_seconds": self.age_seconds + seconds})


class Notice(_Record):
    """A session has reached this length, or at length 0 come to be or to an end."""

    tenant: Name
    session: Name
    generation: Generation
    length: Whole


def living(replicas: Iterable[ReplicaEntry]) -> list[ReplicaEntry]:
    """By name, without those that were last seen REPLICA_KEPT_SECONDS or more before the latest."""
    found = sorted(replicas, key=lambda each: each.name)
    latest = max((each.seen_unix_seconds for each in found), default=0.0)
    return [each for each in found if each.seen_unix_seconds > latest - REPLICA_KEPT_SECONDS]


class Index(Protocol):
    """Raises Unavailable (INDEX_UNAVAILABLE) when what keeps it does not answer; nothing acknowledged depends on it."""

    malformed: int
    """Values found that this program did not write; each was treated as absent and logged."""

    async def put(self, entry: SessionEntry) -> bool:
        """Keeps `entry`; False, changing nothing, if a later version is there or its generation was removed."""
        ...

    async def remove(self, tenant: str, name: str, generation: str) -> None:
        """Forgets this generation and those before it; a later one stays."""
        ...

    async def get(self, tenant: str, name: str) -> SessionEntry | None: ...

    async def list(self, tenant: str, *, prefix: str = "", after: str = "", limit: int) -> list[SessionEntry]:
        """The first `limit` sessions by name that start with `prefix` and sort after `after`; fewer means no more."""
        ...

    async def touch(self, tenant: str, name: str, unix_seconds: float) -> None:
        """Moves last_used_unix_seconds forward, never back; nothing happens if the session is not there."""
        ...

    async def put_prefixes(self, tenant: str, entries: Sequence[tuple[str, PrefixEntry]]) -> None:
        """Keeps each under its label (64 hex digits), beside those of other sessions."""
        ...

    async def find_prefixes(self, tenant: str, labels: Sequence[str]) -> Sequence[Sequence[PrefixEntry]]:
        """For each label at most PREFIX_CANDIDATES entries."""
        ...

    async def drop_prefix(self, tenant: str, label: str, session: str) -> None: ...

    async def publish(self, notice: Notice) -> None:
        """Tells those who are subscribed now."""
        ...

    def subscribe(self) -> AbstractAsyncContextManager[AsyncIterator[Notice]]:
        """Notices published from entry on. The iterator raises Unavailable when some may have been missed."""
        ...

    async def announce(self, replica: ReplicaEntry) -> None:
        """Keeps the entry under its name."""
        ...

    async def replicas(self) -> Sequence[ReplicaEntry]:
        """By name; those not seen for REPLICA_KEPT_SECONDS before the latest are forgotten."""
        ...

    async def put_census(self, census: Census) -> None:
        """Keeps it in place of any other."""
        ...

    async def census(self) -> Census | None:
        """The one that is kept, its age that of now."""
        ...

    async def ping(self) -> None:
        """Returns if the index answers."""
        ...

    async def clear(self) -> None:
        """Removes everything of every tenant, as a rebuild begins."""
        ...

    async def close(self) -> None: ...
