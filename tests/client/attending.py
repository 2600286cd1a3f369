"""The server's side of Attend streams, as a test wants it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from grpc import aio

from kvstore_client import AsyncKVStoreClient, Session
from kvstore_client.tensors import from_proto
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .scripted import Failure, ScriptedServer, fail

Replies = Iterable[pb.AttendResponse | Failure | None]


class Attending:
    """Binds what it is asked to and answers steps by `on_step`, or else with their layer's number everywhere.

    A Failure from `on_step` ends the stream with it, None ends it in order.
    """

    def __init__(self, on_step: Callable[[pb.AttendStep], Replies] | None = None) -> None:
        self.on_step = on_step or (lambda step: [answer(step)])
        self.on_bind: Callable[[pb.AttendBind], pb.AttendResponse] = bound
        self.streams = 0
        self.ended = 0
        self.binds: list[pb.AttendBind] = []
        self.steps: list[pb.AttendStep] = []
        self.cancels: list[int] = []

    async def __call__(self, requests: AsyncIterator[Any], context: aio.ServicerContext) -> AsyncIterator[Any]:
        self.streams += 1
        async for request in requests:
            match request.WhichOneof("body"):
                case "bind":
                    self.binds.append(request.bind)
                    yield self.on_bind(request.bind)
                case "cancel":
                    self.cancels.append(request.cancel.request_id)
                case "step":
                    self.steps.append(request.step)
                    for reply in self.on_step(request.step):
                        if reply is None:
                            return
                        if isinstance(reply, Failure):
                            await fail(context, reply)
                        else:
                            yield reply
        self.ended += 1


def bound(bind: pb.AttendBind) -> pb.AttendResponse:
    return pb.AttendResponse(handle=bind.handle, bound=pb.AttendBound(session=inputs.session(bind.session)))


def answer(step: pb.AttendStep) -> pb.AttendResponse:
    return pb.AttendResponse(request_id=step.request_id, result=inputs.result(from_proto(step.q), float(step.layer)))


def error(step: pb.AttendStep, failure: Failure) -> pb.AttendResponse:
    return pb.AttendResponse(request_id=step.request_id, error=failure.status())


async def opened(server: ScriptedServer, client: AsyncKVStoreClient, name: str, **more: object) -> Session:
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session(name, **more)))  # type: ignore[arg-type]
    return await client.open_session(name)


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


GOING_AWAY = pb.AttendResponse(going_away=pb.AttendGoingAway())
