"""How many replicas one Redis and one prefix of a bucket carry, from what one operation was measured to ask of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from kvstore_codecs.named import codec_named, shape_named
from kvstore_codecs.size import bytes_per_token
from kvstore_server.config import Settings
from kvstore_server.monitoring.roll import PERIOD_SECONDS
from kvstore_server.sessions.maintenance import SWEEPS

from .work import APPEND, CENSUS, CHANGE, IDLE, LIST, PAGE_SESSIONS, READ, SET, USE, Work

PREFIX_WRITES_MAX, PREFIX_READS_MAX = 3_500.0, 5_500.0
"""Requests a second that Amazon S3 promises for each prefix (its user guide, "Best practices design patterns")."""
SWEEP_SECONDS = 0.75 * Settings.model_fields["sweep_seconds"].default / SWEEPS
"""Between a replica's sweeps, on average."""
ROLL_COMMANDS = 2 / PERIOD_SECONDS
"""A second, of each replica: it says that it lives and asks who else does."""
MODEL, CODEC = "llama-3.1-8b", "rotated:4"
REPLICAS_MAX = 1 << 20


@dataclass(frozen=True)
class Replica:
    """What one replica on a GPU is busy with: docs/performance.md, "Service", and `kvstore size` for the sessions."""

    attends: float = 4_343.0
    """Steps a second."""
    append_bytes: float = 1.53e9
    """Of fp16 vectors a second."""
    append_tokens: int = 512
    """Of one append."""
    in_use: int = 15
    """Sessions that are being asked."""
    stored: int = 100
    """Sessions in the store, for each replica there is."""

    @property
    def appends(self) -> float:
        """A second."""
        return self.append_bytes / (self.append_tokens * shape_named(MODEL).raw_bytes_per_token)


@dataclass(frozen=True)
class Demand:
    """Of so many replicas, a second; `redis_busy` is Redis's one thread, 1.0 all of it."""

    replicas: int
    attends: float
    appends: float
    redis_requests: float
    redis_busy: float
    store_writes: float
    store_reads: float
    store_bytes: float

    @property
    def prefixes(self) -> int:
        """So many must the bucket spread its sessions over."""
        return max(1, ceil(self.store_writes / PREFIX_WRITES_MAX), ceil(self.store_reads / PREFIX_READS_MAX))


def demand(work: Mapping[str, Work], ceilings: Mapping[str, float], replica: Replica, replicas: int) -> Demand:
    """Attends ask nothing of Redis, and of the store what `a second of a session in use` says.

    At its sweep each replica tells of the sessions in use and reads the census; one of them lists all sessions.
    """
    append, used, idle = work[APPEND], work[USE], work[IDLE]
    appends, in_use = replicas * replica.appends, replicas * replica.in_use
    sweeps, pages = replicas / SWEEP_SECONDS, replicas * replica.stored / PAGE_SESSIONS / SWEEP_SECONDS
    small = replicas * ROLL_COMMANDS + in_use / SWEEP_SECONDS
    return Demand(
        replicas=replicas,
        attends=replicas * replica.attends,
        appends=appends,
        redis_requests=appends * append.scripts + sweeps + pages + small,
        redis_busy=appends * append_seconds(work, ceilings)
        + sweeps / ceilings[CENSUS]
        + pages / ceilings[LIST]
        + small / ceilings[SET],
        store_writes=appends * append.puts,
        store_reads=appends * append.reads + in_use * used.reads + replicas * idle.reads,
        store_bytes=appends * replica.append_tokens * bytes_per_token(codec_named(CODEC), shape_named(MODEL)),
    )


def append_seconds(work: Mapping[str, Work], ceilings: Mapping[str, float]) -> float:
    """Of Redis's thread: half of an append's scripts read its entry, half change it."""
    return work[APPEND].scripts / 2 * (1 / ceilings[READ] + 1 / ceilings[CHANGE])


def replicas_within(work: Mapping[str, Work], ceilings: Mapping[str, float], replica: Replica) -> int:
    """The most that Redis carries, by bisection; 0: not even one."""
    fits, fails = 0, REPLICAS_MAX
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if demand(work, ceilings, replica, middle).redis_busy <= 1:
            fits = middle
        else:
            fails = middle
    return fits
