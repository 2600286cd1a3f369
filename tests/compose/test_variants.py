"""The stack with another of the repository's files over it."""

import time
from collections.abc import Callable

import pytest
import torch

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.named import shape_named
from kvstore_codecs.spec import RAW

from ..faults.tally import Row, only_in_the_whole_suite
from ..faults.workload import work_through
from .loopback import REPLICAS
from .stack import Stack, service
from .test_stack import ENVOY, crash

pytestmark = [only_in_the_whole_suite, pytest.mark.root, pytest.mark.slow]
Tell = Callable[[str, object], None]


async def round_trip(target: str) -> str:
    """Writes, reads back and compares; the kind of store."""
    k, v = torch.randn(2, 2, 100, 1, 32).bfloat16()
    async with AsyncKVStoreClient(target) as client:
        session = await client.create_session("s", shape_named("2x1x2x32"), RAW)
        await session.append(k, v, start=0)
        assert all(map(torch.equal, await session.fetch(), (k, v)))
        return (await client.server_info()).store


async def test_the_minimal_stack_serves_without_keys(private_docker: None, tell: Tell) -> None:
    stack = Stack("deploy/compose.minimal.yml")
    begun = time.monotonic()
    with stack.up():
        seconds = time.monotonic() - begun
        assert {service(each) for each in stack.containers()} == {"secrets", "redis", "kvstore"}
        assert await round_trip(f"{REPLICAS[0]}:7700") == "local"
        tell("compose.minimal.yml", f"up in {seconds:.0f} s, written and read")


async def test_the_stack_over_a_bucket_keeps_what_it_acknowledged(
    private_docker: None, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack("deploy/compose.s3.yml")
    begun = time.monotonic()
    with stack.up():
        seconds = time.monotonic() - begun
        monkeypatch.setenv("KVSTORE_API_KEY", stack.key())
        assert await round_trip(ENVOY) == "s3"
        row = Row("kill -9")

        async def disturb(cycle: int) -> None:
            crash(stack, cycle % 2)

        await work_through(disturb, 2, row, target=ENVOY, workers=2, check_at=[f"{each}:7700" for each in REPLICAS])
        tell(
            "compose.s3.yml",
            f"up in {seconds:.0f} s, {row.cycles} kills, {row.operations:,} checked, {row.losses} losses",
        )
