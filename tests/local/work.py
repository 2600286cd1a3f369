"""What one operation asks of Redis and of the store: differences of their own counters, less what goes on anyway."""

import re
import subprocess
import time
from asyncio import sleep
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from urllib.request import urlopen

import torch
from redis import Redis

from kvstore_client import AsyncKVStoreClient, Session
from kvstore_codecs.named import shape_named
from kvstore_server.metadata.keys import key
from kvstore_server.metadata.redis import CENSUS_BYTES_MAX
from kvstore_server.metadata.scripts import PAGE, READ_CENSUS, STATE, SWAP
from kvstore_server.sessions.maintenance import LARGEST
from kvstore_server.sessions.maintenance import PAGE as PAGE_SESSIONS

from .stack import REDIS_USER, Stack

SHAPE = "4x2x8x64"
APPEND_TOKENS, APPENDS, SESSIONS = 256, 40, 20
SMALL_APPENDS = 64
"""As many as merge.objects_min."""
IDLE_SECONDS, USED_SECONDS, MERGE_SECONDS_MAX = 15.0, 8.0, 60.0
ATTEND_PAUSE_SECONDS = 0.05
SETTLE_SECONDS = 0.5
IDLE, CREATE, APPEND = "a second of an idle replica", "create a session", f"append {APPEND_TOKENS} tokens"
USE, APPEND_ONE, DELETE = "a second of a session in use", "append 1 token", "delete a session"
MERGE = f"merge {SMALL_APPENDS} objects"
BENCHMARK_REQUESTS, BENCHMARK_CLIENTS = 50_000, 32
SET, READ, CHANGE = "SET", "script that reads an entry", "script that changes it"
CENSUS = "script that reads the census"
LIST = f"script that lists {PAGE_SESSIONS:,} sessions"
OWN = {"info", "auth", "hello", "client", "ping"}
"""Commands of this measurement and of connections, not of operations."""
ENTRY_BYTES = 320
"""About what an entry of a session takes as JSON; a census is mostly such entries."""


@dataclass(frozen=True)
class Work:
    """Of one operation, or of one second where `name` says so, on average."""

    name: str
    scripts: float
    """Calls of a script: round trips."""
    commands: float
    """As Redis counts them, those within scripts too."""
    puts: float
    gets: float
    """GET and HEAD."""
    lists: float
    put_bytes: float

    @property
    def reads(self) -> float:
        return self.gets + self.lists


class Meter:
    """Redis's and the store's counters, and how fast they rise while nothing is asked."""

    def __init__(self, stack: Stack) -> None:
        assert stack.s3 is not None
        self._s3, self.redis = stack.s3, connected(stack)
        self.idle = Work("", 0, 0, 0, 0, 0, 0)
        """A second of it."""

    async def of(self, name: str, count: float, work: Callable[[], Awaitable[object]]) -> Work:
        """`work` does `count` of them."""
        before, began = self._now(), time.monotonic()
        await work()
        await sleep(SETTLE_SECONDS)  # the index hears of it after the answer
        seconds = time.monotonic() - began
        after = self._now()
        counted = {field: after[field] - before[field] for field in asdict(self.idle) if field != "name"}
        idle = asdict(self.idle)
        return Work(name, **{field: max(0.0, (n - idle[field] * seconds) / count) for field, n in counted.items()})

    def _now(self) -> dict[str, float]:
        calls = Counter[str]()
        for name, found in self.redis.info("commandstats").items():  # pyright: ignore[reportAttributeAccessIssue]
            calls[name.removeprefix("cmdstat_").partition("|")[0]] += found["calls"]
        store = self._s3.counts()
        return {
            "scripts": calls["evalsha"],
            "commands": sum(n for name, n in calls.items() if name not in OWN),
            "puts": store["PUT"],
            "gets": store["GET"] + store["HEAD"],
            "lists": store["LIST"],
            "put_bytes": store["put_bytes"],
        }


def connected(stack: Stack) -> Redis:
    host, _, port = stack.redis.address.rpartition(":")
    return Redis(host, int(port), username=REDIS_USER, password=_password(stack), socket_timeout=10)


async def measured(stack: Stack) -> list[Work]:
    """Of one replica's idle second, and of each kind of operation, through Envoy."""
    meter = Meter(stack)
    async with AsyncKVStoreClient(stack.envoy.address) as client:
        await _appended(await _created(client, "first"), 1, 1)  # what is compiled or connected at the first time
        idle = await meter.of("", IDLE_SECONDS, lambda: sleep(IDLE_SECONDS - SETTLE_SECONDS))
        meter.idle = idle
        sessions: list[Session] = []

        async def create() -> None:
            sessions.extend([await _created(client, f"s{n}") for n in range(SESSIONS)])

        rows = [
            await meter.of(CREATE, SESSIONS, create),
            await meter.of(APPEND, APPENDS, lambda: _appended(sessions[0], APPENDS, APPEND_TOKENS)),
            await meter.of(USE, USED_SECONDS, lambda: _attended(sessions[0])),
            await meter.of(APPEND_ONE, SMALL_APPENDS, lambda: _appended(sessions[1], SMALL_APPENDS, 1)),
            await meter.of(MERGE, 1, lambda: _merged(stack)),
            await meter.of(DELETE, SESSIONS, lambda: _deleted(client, sessions)),
        ]
    share = 1 / len(stack.replicas.targets)
    parts = {name: value * share for name, value in asdict(idle).items() if name != "name"}
    return [Work(IDLE, **parts), *rows]


def redis_ceilings(stack: Stack) -> dict[str, float]:
    """Requests a second by redis-benchmark: of a plain SET, of the scripts of an append, of those of a sweep."""
    redis, keys = connected(stack), [key("bench", part) for part in ("sessions", "names", "used", "removed")]
    value = "x" * ENTRY_BYTES
    state, swap, page, census = (str(redis.script_load(script)) for script in (STATE, SWAP, PAGE, READ_CENSUS))
    redis.set(key("bench", "census"), value * LARGEST, ex=3600)
    for number in range(PAGE_SESSIONS):
        redis.evalsha(swap, 4, *keys, f"s{number}", "", "", value, "1", "", "1")
    commands = {
        SET: ("set", key("bench", "plain"), value),
        READ: ("evalsha", state, "4", *keys, "s0"),
        CHANGE: ("evalsha", swap, "4", *keys, "s0", value, "", value, "1", "", "1"),
        CENSUS: ("evalsha", census, "1", key("bench", "census"), str(CENSUS_BYTES_MAX)),
        LIST: ("evalsha", page, "3", *keys[:3], "[", "[\xff", "0", str(PAGE_SESSIONS)),
    }
    return {name: _benchmarked(stack, command) for name, command in commands.items()}


def metric(address: str, name: str) -> float:
    """All samples of that name together, of the server whose metrics are there."""
    with urlopen(f"http://{address}/metrics", timeout=10) as page:
        return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.MULTILINE)))


def _benchmarked(stack: Stack, command: tuple[str, ...]) -> float:
    host, _, port = stack.redis.address.rpartition(":")
    options = ("-h", host, "-p", port, "--user", REDIS_USER, "-a", _password(stack), "--csv")
    requests = BENCHMARK_REQUESTS if command[-1] != str(PAGE_SESSIONS) else BENCHMARK_REQUESTS // 50
    counts = ("-n", str(requests), "-c", str(BENCHMARK_CLIENTS))
    ran = subprocess.run(
        ["redis-benchmark", *options, *counts, *command], capture_output=True, text=True, timeout=120, check=True
    )
    return float(ran.stdout.strip().splitlines()[-1].rsplit('","', 7)[1].strip('"'))


def _password(stack: Stack) -> str:
    return (stack.plan.folder / "redis_password").read_text().strip()


async def _created(client: AsyncKVStoreClient, name: str) -> Session:
    return await client.create_session(name, shape_named(SHAPE))


async def _appended(session: Session, times: int, tokens: int) -> None:
    shape = session.shape
    k, v = torch.randn(2, shape.layers, tokens, shape.kv_heads, shape.head_dim).bfloat16()
    for _ in range(times):
        await session.append(k, v, start=session.length)


async def _attended(session: Session) -> None:
    prefix, q = session.pin(), torch.randn(1, session.shape.query_heads, session.shape.head_dim)
    end = time.monotonic() + USED_SECONDS - SETTLE_SECONDS
    while time.monotonic() < end:
        await prefix.attend(0, q)
        await sleep(ATTEND_PAUSE_SECONDS)


async def _merged(stack: Stack) -> None:
    """Until a replica has merged; they look every few seconds."""
    give_up = time.monotonic() + MERGE_SECONDS_MAX
    while not any(metric(each, "kvstore_merged_objects") for each in stack.replicas.metrics):
        if time.monotonic() > give_up:
            raise RuntimeError(f"nothing was merged within {MERGE_SECONDS_MAX:g} s")
        await sleep(0.5)


async def _deleted(client: AsyncKVStoreClient, sessions: list[Session]) -> None:
    for session in sessions:
        await client.delete_session(session.name)
