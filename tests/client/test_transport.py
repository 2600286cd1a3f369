import asyncio
import re
import time

import grpc
import pytest

from kvstore_client import (
    NO_RETRY,
    AsyncKVStoreClient,
    Cancelled,
    DeadlineExceeded,
    ResourceExhausted,
    Session,
    Unavailable,
)
from kvstore_client.retry import is_retryable
from kvstore_client.transport import _error_of
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .scripted import Call, Failure, ScriptedServer


async def test_calls_carry_the_library_s_version_and_a_deadline(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("GetServerInfo", inputs.server_info())
    await client.server_info(timeout=7)
    (call,) = server.calls
    assert re.match(r"remote-kv-store-python/\d", call.metadata["user-agent"])
    assert call.seconds is not None
    assert 5 < call.seconds <= 7


async def test_calls_about_a_session_carry_its_affinity(server: ScriptedServer, session: Session):
    server.will("UpdateSession", pb.UpdateSessionResponse(session=inputs.session()))
    await session.update(pinned=True)
    assert server.of("UpdateSession")[0].metadata["x-kv-affinity"] == "root-of-book"
    assert "x-kv-affinity" not in server.of("GetSession")[0].metadata


async def test_a_server_that_does_not_answer_costs_no_more_than_the_deadline(
    server: ScriptedServer, client: AsyncKVStoreClient
):
    async def never(_: Call) -> None:
        await asyncio.Event().wait()

    server.always("GetServerInfo", never)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.server_info(timeout=0.2)
    assert time.monotonic() - began < 1


async def test_nobody_listening_is_unavailable_within_the_deadline():
    async with AsyncKVStoreClient("127.0.0.1:1", retry=NO_RETRY) as client:
        with pytest.raises(Unavailable):
            await client.server_info(timeout=5)


async def test_a_closed_client_says_so(server: ScriptedServer, client: AsyncKVStoreClient):
    await client.close()
    with pytest.raises(Cancelled, match="the client is closed"):
        await client.server_info()


async def test_a_lost_call_is_made_again(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("GetServerInfo", Failure("UNAVAILABLE"), Failure("UNAVAILABLE"), inputs.server_info())
    assert (await client.server_info()).version == "1.2.3"


async def test_a_full_server_without_a_hint_is_not_asked_again(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("GetServerInfo", Failure("RESOURCE_EXHAUSTED"))
    with pytest.raises(ResourceExhausted):
        await client.server_info()


async def test_a_full_server_with_a_hint_is_asked_again_after_it(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("GetServerInfo", Failure("RESOURCE_EXHAUSTED", retry_after_seconds=0.15), inputs.server_info())
    began = time.monotonic()
    await client.server_info()
    assert time.monotonic() - began >= 0.15


async def test_a_stream_that_breaks_in_the_middle_is_read_again_from_its_start(
    server: ScriptedServer, client: AsyncKVStoreClient
):
    halves = [pb.GetProjectionResponse(data=b"one "), pb.GetProjectionResponse(data=b"two")]
    server.will("GetProjection", [halves[0], Failure("UNAVAILABLE")], halves)
    assert await client.get_projection("ab") == b"one two"


@pytest.mark.parametrize(
    "said", ["Stream removed (RST_STREAM (Received RST_STREAM with error code 2))", "Internal error from Core"]
)
async def test_what_a_proxy_or_grpc_itself_calls_internal_when_a_server_is_lost_is_asked_again(
    server: ScriptedServer, client: AsyncKVStoreClient, said: str
):
    server.will("GetServerInfo", Failure("INTERNAL", said), inputs.server_info())
    assert (await client.server_info()).version == "1.2.3"


async def test_cancelling_a_call_ends_it_at_the_server(server: ScriptedServer, client: AsyncKVStoreClient):
    began, ended = asyncio.Event(), asyncio.Event()

    async def never(_: Call) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    server.will("GetServerInfo", never)
    task = asyncio.create_task(client.server_info())
    await asyncio.wait_for(began.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_server_restarted_on_its_port_is_found_again(server: ScriptedServer):
    server.always("GetServerInfo", inputs.server_info())
    async with AsyncKVStoreClient(server.target) as client:
        await client.server_info()
        await server.stop()
        waiting = asyncio.create_task(client.server_info(timeout=10))
        await asyncio.sleep(0.05)
        await server.start()
        assert (await waiting).version == "1.2.3"


async def test_a_message_of_fourteen_mebibytes_passes(server: ScriptedServer, client: AsyncKVStoreClient):
    data = bytes(14 << 20)
    server.will("GetProjection", [pb.GetProjectionResponse(data=data)])
    assert await client.get_projection("ab") == data


async def test_pushback_in_the_trailers_says_when_to_come_again_where_there_is_no_retry_info():
    error = _error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", [("grpc-retry-pushback-ms", "1500")])
    assert error.retry_after_seconds == 1.5
    assert is_retryable(error)
    for value in ("-1", "soon"):
        error = _error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", [("grpc-retry-pushback-ms", value)])
        assert not is_retryable(error)
