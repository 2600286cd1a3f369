"""Callers without a key send large messages: the server does not keep them."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from kvstore_server.rpc.handlers import SERVICE

from ..running import ServerProcess

CALLS, AT_ONCE = (1000 if os.environ.get("KVSTORE_TIER") == "F" else 100), 8
BODY = bytes(16 << 20)
GROWTH_BYTES_MAX = 50 << 20


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def codes_of(target: str, method: str, calls: int) -> set[str]:
    with grpc.insecure_channel(target, options=[("grpc.max_send_message_length", 17 << 20)]) as channel:
        send = channel.unary_unary(f"/{SERVICE.full_name}/{method}")

        def code(_: int) -> str:
            try:
                send(BODY, timeout=60)
            except grpc.RpcError as error:
                return error.code().name  # type: ignore[attr-defined]
            return "OK"

        with ThreadPoolExecutor(AT_ONCE) as callers:
            return set(callers.map(code, range(calls)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["TopK", "Append"])
async def test_refused_messages_take_no_memory(
    tmp_path: Path, method: str, record_property: Callable[[str, object], None]
) -> None:
    server = ServerProcess(tmp_path, env={"KVSTORE__IDENTITY__API_KEYS": "true"})
    try:
        await asyncio.to_thread(codes_of, server.target, method, AT_ONCE)
        before = resident_bytes(server.pid)
        codes = await asyncio.to_thread(codes_of, server.target, method, CALLS)
        growth = resident_bytes(server.pid) - before
    finally:
        server.kill()
    assert codes == {"UNAUTHENTICATED"}
    record_property("cases", CALLS)
    print(f"{CALLS} refused calls of {len(BODY) >> 20} MiB: {growth / 2**20:+.1f} MiB")
    assert growth < GROWTH_BYTES_MAX
