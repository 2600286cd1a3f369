import asyncio
import inspect
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvstore_client import AsyncKVStoreClient, KVStoreClient, NotFound, Prefix, Session, SyncPrefix, SyncSession
from kvstore_client.loop_thread import LoopThread
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .attending import Attending
from .inputs import AppendLog, block, query
from .scripted import Failure, ScriptedServer, scripted_server


@pytest.fixture
def server() -> Generator[ScriptedServer]:
    """A scripted server on a loop of its own, as a blocking client sees one."""
    loop = LoopThread()
    context = scripted_server()
    yield loop.run(context.__aenter__())
    loop.run(context.__aexit__(None, None, None))
    loop.close()


def test_the_blocking_client_does_what_the_other_does(server: ScriptedServer):
    server.always("GetServerInfo", inputs.server_info())
    server.will("CreateSession", pb.CreateSessionResponse(session=inputs.session()))
    server.will("ForkSession", pb.ForkSessionResponse(session=inputs.session("child", length=4)))
    server.always("Append", AppendLog())
    server.always("Attend", Attending())
    with KVStoreClient(server.target) as client:
        session = client.create_session("book", inputs.SHAPE)
        assert session.append(*block(4)) == session.length == 4
        step = session.pin()
        out, lse = step.attend(1, query())
        assert (step.end, out[0, 0, 0].item(), lse[0, 0].item()) == (4, 1, 1)
        assert session.fork("child").name == "child"
        assert client.server_info().version == "1.2.3"


def test_errors_come_through_as_they_are(server: ScriptedServer):
    server.will("GetSession", Failure("NOT_FOUND", reason="NO_SESSION"))
    with KVStoreClient(server.target) as client, pytest.raises(NotFound) as caught:
        client.open_session("book")
    assert caught.value.reason == "NO_SESSION"


def test_threads_share_one_client_one_session_and_one_stream(server: ScriptedServer):
    attending = Attending()
    server.always("Attend", attending)
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session(length=10)))
    with KVStoreClient(server.target) as client, ThreadPoolExecutor(8) as threads:
        session = client.open_session("book")
        answers = list(threads.map(lambda layer: session.attend(layer, query()), range(40)))
    assert [out[0, 0, 0].item() for out, _ in answers] == list(range(40))
    assert (attending.streams, len(attending.binds)) == (1, 1)


def test_closing_ends_the_thread(server: ScriptedServer):
    before = threading.active_count()
    client = KVStoreClient(server.target)
    assert threading.active_count() == before + 1
    client.close()
    assert threading.active_count() == before


def test_an_interrupted_wait_cancels_the_call(server: ScriptedServer):
    loop, cancelled, began = LoopThread(), threading.Event(), threading.Event()

    async def long() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(Interrupt):
            loop.run(long())
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert cancelled.wait(5)
    loop.close()


@pytest.mark.parametrize(
    ("blocking", "inner"), [(KVStoreClient, AsyncKVStoreClient), (SyncSession, Session), (SyncPrefix, Prefix)]
)
def test_nothing_of_the_asynchronous_side_is_missing(blocking: type, inner: type):
    def public(kind: type) -> dict[str, object]:
        return {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}

    missing = set(public(inner)) - set(public(blocking)) - {"link"}
    assert missing == set()
    for name, value in public(inner).items():
        if inspect.iscoroutinefunction(value) and name != "close":
            assert not inspect.iscoroutinefunction(getattr(blocking, name))
            assert getattr(blocking, name).__doc__ == value.__doc__


def test_tensors_pass_unchanged(server: ScriptedServer):
    server.always("GetServerInfo", inputs.server_info())
    log = AppendLog()
    server.always("Append", log)
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session()))
    k, v = block(3)
    with KVStoreClient(server.target) as client:
        client.open_session("book").append(k, v)
    assert torch.equal(log.stored(0, pb.KIND_KEYS), k[0])
