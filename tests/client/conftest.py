from collections.abc import AsyncGenerator

import pytest

from kvstore_client import AsyncKVStoreClient, Retry, Session
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .attending import Attending
from .scripted import ScriptedServer, scripted_server

FAST = Retry(base_delay_seconds=0.001, max_delay_seconds=0.01)


@pytest.fixture
async def server() -> AsyncGenerator[ScriptedServer]:
    async with scripted_server() as server:
        yield server


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncGenerator[AsyncKVStoreClient]:
    async with AsyncKVStoreClient(server.target, retry=FAST) as client:
        yield client


@pytest.fixture
async def session(server: ScriptedServer, client: AsyncKVStoreClient) -> Session:
    """An open session of ten tokens, on a server that answers GetServerInfo."""
    server.always("GetServerInfo", inputs.server_info())
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session(length=10)))
    return await client.open_session("book")


@pytest.fixture
def attending(server: ScriptedServer) -> Attending:
    attending = Attending()
    server.always("Attend", attending)
    return attending
