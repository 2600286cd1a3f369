"""`docker compose up` of the repository's own file: it starts, keeps what it acknowledged, is watched and is closed."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_client import AsyncKVStoreClient, KVStoreClient, KVStoreError
from kvstore_codecs.named import shape_named
from kvstore_codecs.spec import RAW

from ..faults.tally import Row, only_in_the_whole_suite
from ..faults.workload import work_through
from ..monitoring.promql import read_by
from ..monitoring.test_dashboards import exercise, expressions
from ..monitoring.test_prometheus import ask
from .daemon import docker
from .images import layers
from .loopback import REPLICAS
from .stack import Stack, images, kill, service, until

pytestmark = [only_in_the_whole_suite, pytest.mark.root, pytest.mark.slow]
Tell = Callable[[str, object], None]
ENVOY, PROMETHEUS = "127.0.0.1:7700", "127.0.0.1:9090"
KILLS = 4
CODE_BYTES_MAX = 16 << 20
BACK_SECONDS = SCRAPED_SECONDS = 180.0
ONCE = {"secrets", "keys"}
"""Services that end when they are done."""
USERS = {"kvstore": 10001, "redis": 999, "envoy": 101, "prometheus": 65534}


@pytest.fixture(scope="module")
def stack(private_docker: None, tell: Tell) -> Iterator[Stack]:
    """Two replicas behind Envoy, and this process with their key."""
    stack = Stack()
    begun = time.monotonic()
    with stack.up(), pytest.MonkeyPatch.context() as patch:
        tell("docker compose up --build --wait", f"{time.monotonic() - begun:.0f} s")
        patch.setenv("KVSTORE_API_KEY", stack.key())
        yield stack


def test_the_image_is_little_more_than_what_it_needs(stack: Stack, tell: Tell) -> None:
    """Apart from torch and numba: the code is a layer of its own, so that a change of it sends no more than that."""
    name = images(stack)["kvstore"]
    code_bytes, found = layers(name)
    assert code_bytes < CODE_BYTES_MAX
    tell(f"image {name}", found)


def test_every_service_is_healthy_and_has_no_more_rights_than_it_needs(stack: Stack, tell: Tell) -> None:
    containers = stack.containers()
    assert sorted(map(service, containers)) == sorted([*ONCE, *USERS, "kvstore"])
    for container in containers:
        name, state, host = service(container), container["State"], container["HostConfig"]
        if name in ONCE:
            assert (state["Status"], state["ExitCode"]) == ("exited", 0)
            continue
        status = Path(f"/proc/{state['Pid']}/status").read_text()
        facts = {line.partition(":")[0]: line.split()[1:] for line in status.splitlines()}
        assert facts["Uid"] == [str(USERS[name])] * 4
        assert int(facts["CapEff"][0], 16) == 0
        assert facts["NoNewPrivs"] == ["1"]
        assert host["ReadonlyRootfs"]
        assert state["Health"]["Status"] == "healthy"
        tell(name, f"{container['Config']['Image']}, healthy, user {USERS[name]}, read-only, no capabilities")


def test_a_replica_writes_to_its_volumes_only(stack: Stack, tell: Tell) -> None:
    container = stack.containers("kvstore")[0]
    volumes = {mount["Destination"] for mount in container["Mounts"] if mount["Type"] == "volume" and mount["RW"]}
    assert volumes == {"/var/lib/kvstore", "/var/cache/kvstore"}
    script = 'mkdir -p "$CUPY_CACHE_DIR" && echo "$CUPY_CACHE_DIR" && ! touch /opt/kvstore/x && ! touch /secrets/x'
    folder = docker("exec", container["Id"], "sh", "-c", script).strip()
    assert folder.startswith("/var/cache/kvstore/")
    tell("written in a replica", f"{', '.join(sorted(volumes))} and /tmp; CUPY_CACHE_DIR is {folder}")


def test_nobody_comes_in_without_the_key(stack: Stack, tell: Tell) -> None:
    with KVStoreClient(ENVOY, api_key=f"kvs_{'0' * 16}_{'a' * 43}") as client, pytest.raises(KVStoreError) as refused:
        client.server_info()
    with KVStoreClient(ENVOY) as client:
        tell("a wrong key and the right one", f"{refused.value.code}, {client.server_info().store}")
    assert refused.value.code == "UNAUTHENTICATED"


async def test_replicas_are_killed_under_load_and_nothing_acknowledged_is_lost(stack: Stack, tell: Tell) -> None:
    async def disturb(cycle: int) -> None:
        await asyncio.to_thread(crash, stack, cycle % 2)

    row = Row("kill -9 of a replica")
    checked = [f"{address}:7700" for address in REPLICAS]
    await work_through(disturb, KILLS, row, target=ENVOY, workers=4, check_at=checked)
    tell(f"{row.cycles} x {row.fault} under load", f"{row.operations:,} operations checked, {row.losses} losses")


def crash(stack: Stack, number: int) -> None:
    """Kills a replica; Docker starts it again."""
    before = stack.containers("kvstore")[number]
    kill(before)

    def is_back() -> bool:
        state: dict[str, Any] = stack.containers("kvstore")[number]["State"]
        return state["Pid"] not in (0, before["State"]["Pid"]) and state["Health"]["Status"] == "healthy"

    until(is_back, BACK_SECONDS, "the killed replica was not healthy again")


def test_the_load_test_runs_in_a_container_of_its_own(stack: Stack, tell: Tell) -> None:
    options = ("--scenario=mixed", "--workers=4", "--rate=20", "--duration=10", "--tokens=512")
    command = ("--profile=loadtest", "run", "--rm", "-T", "loadtest", *options)
    printed = stack.compose(*command, timeout=300)
    print(printed)
    found = next(line for line in printed.splitlines() if "checked" in line)
    tell("loadtest against Envoy", " ".join(found.split()))


async def test_prometheus_has_every_series_that_dashboards_and_alerts_read(stack: Stack, tell: Tell) -> None:
    wanted = {series for _, expression in expressions() for series in read_by(expression).series}
    missing = wanted | {"kvstore_planted"}
    async with asyncio.timeout(SCRAPED_SECONDS):
        while missing != {"kvstore_planted"}:
            for _ in range(20):
                await exercise(ENVOY)
            names = await asyncio.to_thread(ask, PROMETHEUS, "/api/v1/label/__name__/values")
            missing = (wanted | {"kvstore_planted"}) - set(names)
    for where, expression in expressions():
        assert await asyncio.to_thread(ask, PROMETHEUS, "/api/v1/query", query=expression) is not None, where
    up = await asyncio.to_thread(ask, PROMETHEUS, "/api/v1/query", query='up{job="kvstore"}')
    assert [sample["value"][1] for sample in up["result"]] == ["1", "1"]
    tell("scraped", f"{len(wanted)} of {len(wanted)} series of {len(list(expressions()))} expressions, 2 replicas up")


async def test_what_was_stored_outlives_the_containers(stack: Stack, tell: Tell) -> None:
    shape = shape_named("2x1x2x32")
    k, v = torch.randn(2, 2, 100, 1, 32).bfloat16()
    async with AsyncKVStoreClient(ENVOY) as client:
        session = await client.create_session("kept", shape, RAW)
        await session.append(k, v, start=0)
    stack.compose("down", timeout=120)
    begun = time.monotonic()
    await asyncio.to_thread(stack.start)
    assert stack.key()
    async with AsyncKVStoreClient(ENVOY) as client:
        session = await client.create_session("kept", shape, RAW)
        assert all(map(torch.equal, await session.fetch(), (k, v)))
    tell("down and up again", f"{time.monotonic() - begun:.0f} s, the session and the key are there")
