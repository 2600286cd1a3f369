"""Attention steps over one bidirectional stream: multiplexed, reconnecting, each step with its own deadline."""

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import count

from kvstore_client.answers import Precision
from kvstore_client.errors import (
    CLOSED,
    Cancelled,
    DeadlineExceeded,
    Internal,
    KVStoreError,
    Unavailable,
    Unknown,
    from_status,
)
from kvstore_client.retry import Clock, Retry
from kvstore_client.rpcs import ATTEND
from kvstore_client.transport import Transport
from kvstore_proto.v1 import kvstore_pb2 as pb

INFLIGHT_MAX = 64
"""Steps of one stream; further ones wait here, within their deadlines."""
HANDLES_MAX = 1000
"""Sessions bound on one stream before a fresh one takes over: servers bound them too."""
CLOSE_SECONDS = 1.0


@dataclass(frozen=True)
class Step:
    """Rows of one layer, all of one session's prefix [0, end)."""

    session: str
    generation: str
    end: int
    layer: int
    q: pb.Tensor
    head_offset: int
    precision: Precision
    debias: float | None
    refine: int = 0

    def to_proto(self, request_id: int, handle: int, timeout: float) -> pb.AttendRequest:
        step = pb.AttendStep(
            request_id=request_id,
            timeout_ms=max(1, int(timeout * 1000)),
            layer=self.layer,
            items=[pb.AttendStep.Item(handle=handle, end=self.end, rows=self.q.shape[0])],
            q=self.q,
            head_offset=self.head_offset,
            precision=self.precision.to_proto(),
            lse_base=pb.LSE_BASE_E,
            debias=self.debias,
            refine=self.refine,
        )
        return pb.AttendRequest(step=step)


class AttendStream:
    """Steps of many sessions and tasks on one call to the server, a new call whenever the old one is lost.

    A step changes nothing at the server, so a lost one is simply sent again on the next call.
    """

    def __init__(self, transport: Transport, retry: Retry, clock: Clock, affinity: str) -> None:
        self._transport, self._retry, self._clock, self._affinity = transport, retry, clock, affinity
        self._slots = asyncio.Semaphore(INFLIGHT_MAX)
        self._calls: set[_Call] = set()
        self._current: _Call | None = None
        self._closed = False

    async def attend(self, step: Step, *, timeout: float) -> pb.AttendResult:
        """DeadlineExceeded after `timeout` seconds: waiting, reconnecting and retrying included."""
        try:
            async with asyncio.timeout(timeout), self._slots:
                return await self._retry.run(
                    lambda seconds: self._call().attend(step, seconds), timeout=timeout, clock=self._clock
                )
        except TimeoutError:
            raise DeadlineExceeded(f"the attend step took longer than {timeout:g} s") from None

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*(call.close() for call in self._calls))

    def _call(self) -> "_Call":
        if self._closed:
            raise Cancelled("the client is closed", reason=CLOSED)
        if self._current is None or not self._current.open:
            self._current = call = _Call(self._transport, self._affinity)
            self._calls.add(call)
            call.reader.add_done_callback(lambda _: self._calls.discard(call))
        return self._current


class _Call:
    """One Attend call from its opening to its end. What it still owes when it is lost fails with Unavailable."""

    def __init__(self, transport: Transport, affinity: str) -> None:
        self.open = True
        self._ids = count(1)
        self._active = 0
        """Steps on their way, those that still wait for their bind too."""
        self._outbox: asyncio.Queue[pb.AttendRequest | None] = asyncio.Queue(4 * INFLIGHT_MAX)
        self._owed: dict[tuple[str, int], asyncio.Future[pb.AttendResponse]] = {}
        """By the field of AttendResponse that echoes the id, and the id."""
        self._binds: dict[tuple[str, str], tuple[int, asyncio.Future[pb.AttendResponse]]] = {}
        self.reader = asyncio.create_task(self._read(transport.duplex(ATTEND, self._outgoing(), affinity=affinity)))

    async def attend(self, step: Step, seconds: float) -> pb.AttendResult:
        request_id = next(self._ids)
        sent = False
        self._active += 1
        try:
            async with asyncio.timeout(seconds) as limit:
                handle = await self._bind(step.session, step.generation)
                left = (limit.when() or 0.0) - asyncio.get_running_loop().time()
                reply = self._send(step.to_proto(request_id, handle, left), ("request_id", request_id))
                sent = True
                return (await reply).result
        except (asyncio.CancelledError, TimeoutError) as error:
            if sent:
                self._cancel(request_id)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"no answer to the attend step within {seconds:g} s") from None
            raise
        finally:
            self._owed.pop(("request_id", request_id), None)
            self._active -= 1
            self._end_if_retired()

    async def close(self) -> None:
        """Half-closes, so that the server sees an orderly end, and waits a moment for it."""
        self.open = False
        with suppress(asyncio.QueueFull):
            self._outbox.put_nowait(None)
        await asyncio.wait({self.reader}, timeout=CLOSE_SECONDS)
        self.reader.cancel()
        await asyncio.wait({self.reader})

    async def _bind(self, session: str, generation: str) -> int:
        """The handle of a session on this call; the first step of a session asks, others wait for the same answer."""
        key = (session, generation)
        if key not in self._binds:
            handle = next(self._ids)
            bind = pb.AttendBind(handle=handle, session=session, generation=generation)
            answer = self._send(pb.AttendRequest(bind=bind), ("handle", handle))
            # Those who asked may be gone when it fails: it then counts as seen.
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._binds[key] = handle, answer
            if len(self._binds) >= HANDLES_MAX:
                self.open = False
        handle, bound = self._binds[key]
        try:
            await asyncio.shield(bound)
        except KVStoreError:
            self._binds.pop(key, None)
            raise
        return handle

    def _send(self, request: pb.AttendRequest, owed: tuple[str, int]) -> asyncio.Future[pb.AttendResponse]:
        if self.reader.done():
            raise Unavailable("the Attend stream ended", reason="STREAM_LOST")
        try:
            self._outbox.put_nowait(request)
        except asyncio.QueueFull:
            self.reader.cancel()
            raise Unavailable("the server does not read the Attend stream", reason="STREAM_STUCK") from None
        self._owed[owed] = reply = asyncio.get_running_loop().create_future()
        return reply

    def _cancel(self, request_id: int) -> None:
        with suppress(asyncio.QueueFull):
            self._outbox.put_nowait(pb.AttendRequest(cancel=pb.AttendCancel(request_id=request_id)))

    def _end_if_retired(self) -> None:
        if not self.open and not self._active:
            with suppress(asyncio.QueueFull):
                self._outbox.put_nowait(None)

    async def _outgoing(self) -> AsyncIterator[pb.AttendRequest]:
        while (request := await self._outbox.get()) is not None:
            yield request

    async def _read(self, replies: AsyncGenerator[pb.AttendResponse]) -> None:
        lost: KVStoreError = Unavailable("the Attend stream ended", reason="STREAM_LOST")
        try:
            async with aclosing(replies):
                async for reply in replies:
                    self._take(reply)
        except (Cancelled, DeadlineExceeded, Unknown) as error:
            lost = Unavailable(f"the Attend stream was lost ({error})", reason="STREAM_LOST")
        except KVStoreError as error:
            lost = error
        except Exception as error:
            lost = Internal(f"the Attend stream cannot be read: {error!r}")
        finally:
            self.open = False
            for reply in self._owed.values():
                if not reply.done():
                    reply.set_exception(copy.copy(lost))
            # The transport may still wait for a next request.
            with suppress(asyncio.QueueFull):
                self._outbox.put_nowait(None)

    def _take(self, reply: pb.AttendResponse) -> None:
        body = reply.WhichOneof("body")
        if body == "going_away":
            self.open = False
            self._end_if_retired()
            return
        name = reply.WhichOneof("id")
        owed = self._owed.pop((name, getattr(reply, name)), None) if name else None
        if owed is None or owed.done():
            return
        if body == "error":
            owed.set_exception(from_status(reply.error))
        else:
            owed.set_result(reply)
