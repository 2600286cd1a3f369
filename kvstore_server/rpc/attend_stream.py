"""The Attend stream: sessions bound to handles, many steps in flight, answers in any order.

A step of sessions that are loaded costs neither a task nor a wait of its own: it goes to the device from the task that
reads the stream, and its answer comes back as a callback.
"""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TypeAlias

from torch import Tensor

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.errors import DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted
from kvstore_server.limits import Limits
from kvstore_server.rpc import convert
from kvstore_server.rpc.status import code_name, status_of
from kvstore_server.sessions.model import AttendAnswer, Query
from kvstore_server.sessions.querying import Prepared, Querying
from kvstore_server.telemetry import Telemetry

BUSY_RETRY_SECONDS = 0.01
PREPARED_MAX = 1024
"""Kinds of items that a stream remembers: a few for each layer of each session."""
Answers: TypeAlias = "asyncio.Future[AttendAnswer] | asyncio.Future[list[AttendAnswer]]"


@dataclass(frozen=True)
class StepInFlight:
    """What there is to undo when a step is late or unwanted."""

    answers: Answers
    timer: asyncio.TimerHandle
    bytes: int
    begun: float


class AttendStream:
    """One caller's stream. An error answers the step it belongs to and never ends the stream."""

    def __init__(
        self, querying: Querying, limits: Limits, tenant: str, draining: asyncio.Event, telemetry: Telemetry
    ) -> None:
        self._telemetry = telemetry
        self._querying, self._limits, self._tenant, self._draining = querying, limits, tenant, draining
        self._bound: dict[int, tuple[str, str]] = {}
        self._prepared: dict[Hashable, Prepared] = {}
        self._steps: dict[int, StepInFlight] = {}
        self._bytes = 0
        self._heard = monotonic()
        self._idle = asyncio.Event()
        self._idle.set()
        self._answers: asyncio.Queue[pb.AttendResponse | None] = asyncio.Queue()

    async def run(self, requests: AsyncIterator[pb.AttendRequest]) -> AsyncIterator[pb.AttendResponse]:
        """Answers until the caller is done, has been idle too long, or the server drains."""
        serving = asyncio.create_task(self._serve(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                yield answer
            await serving
        finally:
            serving.cancel()
            for request_id in list(self._steps):
                self._drop(request_id)
            with suppress(asyncio.CancelledError):
                await asyncio.gather(serving, return_exceptions=True)

    async def _serve(self, requests: AsyncIterator[pb.AttendRequest]) -> None:
        reading = asyncio.create_task(self._read(requests))
        drained = asyncio.create_task(self._draining.wait())
        try:
            while not (reading.done() or drained.done() or self._idle_for() >= self._limits.attend_idle_seconds_max):
                left = max(0.0, self._limits.attend_idle_seconds_max - self._idle_for())
                await asyncio.wait({reading, drained}, timeout=left + 0.01, return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                self._answers.put_nowait(pb.AttendResponse(going_away=pb.AttendGoingAway()))
            if reading.done():
                reading.result()
            reading.cancel()
            await self._idle.wait()
        finally:
            reading.cancel()
            drained.cancel()
            self._answers.put_nowait(None)

    def _idle_for(self) -> float:
        """Seconds without a message or a step in flight."""
        return 0.0 if self._steps else monotonic() - self._heard

    async def _read(self, requests: AsyncIterator[pb.AttendRequest]) -> None:
        async for request in requests:
            self._heard = monotonic()
            body = request.WhichOneof("body")
            if body == "step":
                self._start(request.step)
            elif body == "bind":
                self._answers.put_nowait(await self._bind(request.bind))
            elif body == "cancel":
                self._drop(request.cancel.request_id)
            else:
                raise InvalidArgument("body", "is none of bind, step and cancel")

    async def _bind(self, bind: pb.AttendBind) -> pb.AttendResponse:
        try:
            if bind.handle not in self._bound and len(self._bound) >= self._limits.attend_handles_max:
                limit = self._limits.attend_handles_max
                raise InvalidArgument("bind.handle", f"more than {limit} handles on one stream", limit=limit)
            generation = bind.generation if bind.HasField("generation") else None
            info = await self._querying.bind(self._tenant, bind.session, generation)
            if self._bound.get(bind.handle) != (info.name, info.generation):
                self._prepared.clear()
            self._bound[bind.handle] = (info.name, info.generation)
            return pb.AttendResponse(handle=bind.handle, bound=pb.AttendBound(session=convert.session_to(info)))
        except Exception as error:
            return pb.AttendResponse(handle=bind.handle, error=status_of(error))

    def _start(self, step: pb.AttendStep) -> None:
        begun = monotonic()
        try:
            self._admit(step)
            answers = self._answers_of(step, begun + step.timeout_ms / 1000)
        except Exception as error:
            self._answers.put_nowait(self._refusal(step, error, begun))
            return
        timer = asyncio.get_running_loop().call_later(step.timeout_ms / 1000, self._late, step)
        size = len(step.q.data)
        self._steps[step.request_id] = StepInFlight(answers, timer, size, begun)
        self._bytes += size
        self._idle.clear()
        answers.add_done_callback(partial(self._answered, step))

    def _answers_of(self, step: pb.AttendStep, deadline: float) -> Answers:
        """One answer, or one an item; only items of sessions that are not loaded need a task."""
        convert.chosen(convert.LSE_FACTORS, step.lse_base, "step.lse_base")
        q = convert.tensor_from(step.q, "step.q", dims=3)
        items = step.items
        rows = [item.rows for item in items]
        if not rows or min(rows) < 1 or sum(rows) != q.shape[0]:
            raise InvalidArgument("step.items", f"rows {rows[:8]} do not add up to q's {q.shape[0]}")
        if len(rows) == 1:
            return self._answer_of(step, items[0], q, deadline)
        for item in items:
            self._session_of(item)
        parts = zip(items, q.split(rows), strict=True)
        return asyncio.gather(*(self._answer_of(step, item, part, deadline) for item, part in parts))

    def _answer_of(
        self, step: pb.AttendStep, item: pb.AttendStep.Item, q: Tensor, deadline: float
    ) -> "asyncio.Future[AttendAnswer]":
        """Steps differ in their numbers; what they ask is checked once, until the session changes."""
        debias = step.debias if step.HasField("debias") else None
        precision = step.precision.SerializeToString()
        asked = item.handle, item.end, q.shape, q.dtype, step.layer, step.head_offset, step.refine, debias, precision
        prepared = self._prepared.get(asked)
        if prepared is not None:
            answer = self._querying.attend_prepared(self._tenant, prepared, q, deadline)
            if answer is not None:
                return answer
        query = Query(
            *self._session_of(item),
            layer=step.layer,
            end=item.end,
            q=q,
            head_offset=step.head_offset,
            precision=convert.precision_from(step.precision),
            refine=step.refine,
        )
        prepared = self._querying.prepare(self._tenant, query, debias)
        if prepared is not None:
            while len(self._prepared) >= PREPARED_MAX:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[asked] = prepared
            answer = self._querying.attend_prepared(self._tenant, prepared, q, deadline)
            if answer is not None:
                return answer
        return asyncio.ensure_future(self._querying.attend(self._tenant, query, debias, deadline))

    def _session_of(self, item: pb.AttendStep.Item) -> tuple[str, str]:
        """Name and generation."""
        if item.handle not in self._bound:
            raise NotFound("HANDLE_NOT_BOUND", f"handle {item.handle} is not bound", handle=item.handle)
        return self._bound[item.handle]

    def _admit(self, step: pb.AttendStep) -> None:
        limits = self._limits
        if len(step.items) > limits.attend_items_max:
            limit = limits.attend_items_max
            raise InvalidArgument("step.items", f"{len(step.items)} items are more than {limit}", limit=limit)
        if step.request_id in self._steps:
            raise InvalidArgument("step.request_id", f"{step.request_id} is in flight already")
        if not 1 <= step.timeout_ms <= limits.deadline_seconds_max * 1000:
            raise InvalidArgument(
                "step.timeout_ms",
                f"{step.timeout_ms} is outside [1, {limits.deadline_seconds_max * 1000}]",
                limit=limits.deadline_seconds_max * 1000,
            )
        for what, now, limit in (
            ("steps", len(self._steps), limits.attend_inflight_steps_max),
            ("bytes", self._bytes, limits.attend_inflight_bytes_max),
        ):
            if now >= limit:
                raise ResourceExhausted("BUSY", f"{limit} {what} are in flight", BUSY_RETRY_SECONDS, limit=limit)

    def _answered(self, step: pb.AttendStep, answers: Answers) -> None:
        error = None if answers.cancelled() else answers.exception()
        flying = self._taken(step.request_id)
        if flying is None or answers.cancelled():
            return
        if isinstance(error, Exception):
            self._answers.put_nowait(self._refusal(step, error, flying.begun))
            return
        if error is not None:
            raise error
        response, found = pb.AttendResponse(request_id=step.request_id), answers.result()
        convert.fill_attended(response.result, found if isinstance(found, list) else [found], step.lse_base)
        self._telemetry.step("OK", monotonic() - flying.begun)
        self._answers.put_nowait(response)

    def _late(self, step: pb.AttendStep) -> None:
        if self._drop(step.request_id):
            late = DeadlineExceeded("DEADLINE", f"the step took longer than {step.timeout_ms} ms")
            self._answers.put_nowait(self._refusal(step, late, monotonic() - step.timeout_ms / 1000))

    def _refusal(self, step: pb.AttendStep, error: Exception, begun: float) -> pb.AttendResponse:
        status = status_of(error)
        self._telemetry.step(code_name(status.code), monotonic() - begun)
        return pb.AttendResponse(request_id=step.request_id, error=status)

    def _drop(self, request_id: int) -> bool:
        """Lets go of a step that nobody waits for; False if it was answered already."""
        flying = self._taken(request_id)
        if flying is not None:
            flying.answers.cancel()
        return flying is not None

    def _taken(self, request_id: int) -> StepInFlight | None:
        flying = self._steps.pop(request_id, None)
        if flying is not None:
            flying.timer.cancel()
            self._bytes -= flying.bytes
            if not self._steps:
                self._heard = monotonic()
                self._idle.set()
        return flying
