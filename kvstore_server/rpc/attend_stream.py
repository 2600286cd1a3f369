"""The Attend stream: sessions bound to handles, many steps in flight, answers in any order.

A step of sessions that are loaded costs neither a task nor a wait of its own: it goes to the device from the task that
reads the stream, and its answer comes back as a callback.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TypeAlias

import torch

from kvstore_kernels.host import HostArray
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.errors import DeadlineExceeded, InvalidArgument, KVStoreError, NotFound, ResourceExhausted
from kvstore_server.limits import Limits
from kvstore_server.rpc import convert
from kvstore_server.rpc.admission import STEP_RETRY_SECONDS, Admission
from kvstore_server.rpc.attend_replies import encode_attended
from kvstore_server.rpc.outbox import Outbox
from kvstore_server.rpc.status import code_name, status_of
from kvstore_server.scheduling.completion import Told
from kvstore_server.sessions.model import AttendAnswer, Query
from kvstore_server.sessions.querying import Prepared, Querying, Tell
from kvstore_server.telemetry import Telemetry

Receive: TypeAlias = Callable[[], Awaitable[pb.AttendRequest | None]]
"""The next message; None at the end."""
KNOWN_MAX = 1024
"""Kinds of items that a stream remembers: a few for each layer of each session."""


@dataclass(slots=True)
class StepInFlight:
    """What is known of a step until it is answered, and what there is to undo when it is late or unwanted."""

    request_id: int
    lse_base: pb.LseBase.ValueType
    timer: asyncio.TimerHandle
    bytes: int
    begun: float
    missing: int
    """Items without an answer."""
    answers: dict[int, AttendAnswer] = field(default_factory=dict)
    parts: "list[Told[AttendAnswer] | asyncio.Task[AttendAnswer]]" = field(default_factory=list)

    def cancel(self) -> None:
        self.timer.cancel()
        for part in self.parts:
            part.cancel()


@dataclass(frozen=True, slots=True)
class Known:
    """Items that ask the same but for their numbers."""

    prepared: Prepared
    dtype: torch.dtype
    shape: tuple[int, ...]


class AttendStream:
    """One caller's stream. An error answers the step it belongs to and never ends the stream."""

    def __init__(
        self,
        querying: Querying,
        limits: Limits,
        tenant: str,
        admission: Admission,
        telemetry: Telemetry,
        outbox: Outbox,
    ) -> None:
        self._telemetry, self._outbox = telemetry, outbox
        self._querying, self._limits, self._tenant, self._admission = querying, limits, tenant, admission
        self._turns, self._room = admission.turns(tenant), admission.pools["steps"].share(tenant)
        self._bound: dict[int, tuple[str, str]] = {}
        self._known: dict[Hashable, Known] = {}
        self._steps: dict[int, StepInFlight] = {}
        self._bytes = 0
        self._heard = monotonic()
        self._idle = asyncio.Event()
        self._idle.set()
        self._taking = asyncio.Event()
        outbox.taken = self._taken_up

    async def run(self, receive: Receive) -> None:
        """Answers until the caller is done, has been idle too long, or the server drains."""
        serving = asyncio.create_task(self._serve(receive))
        ended = self._outbox.ended
        try:
            await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await self._outbox.flush()
            if ended.done():
                ended.result()
            serving.result()
        finally:
            serving.cancel()
            try:
                with suppress(asyncio.CancelledError):
                    await asyncio.gather(serving, return_exceptions=True)
            finally:  # no step comes in any more
                for request_id in list(self._steps):
                    self._drop(request_id)
                self._outbox.close()

    async def _serve(self, receive: Receive) -> None:
        reading = asyncio.create_task(self._read(receive))
        drained = asyncio.create_task(self._admission.draining.wait())
        aged = asyncio.get_running_loop().call_later(self._limits.attend_stream_seconds_max, self._go_away)
        try:
            while not (reading.done() or drained.done() or self._idle_for() >= self._limits.attend_idle_seconds_max):
                left = max(0.0, self._limits.attend_idle_seconds_max - self._idle_for())
                await asyncio.wait({reading, drained}, timeout=left + 0.01, return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                self._go_away()
            if reading.done():
                reading.result()
            reading.cancel()
            await self._idle.wait()
        finally:
            reading.cancel()
            drained.cancel()
            aged.cancel()

    def _go_away(self) -> None:
        """Asks for the next steps on another stream. While the server goes on these are still answered."""
        self._outbox.put(pb.AttendResponse(going_away=pb.AttendGoingAway()))

    def _taken_up(self, size: int | None) -> None:
        """An answer has left, or never will."""
        self._let_go(size)
        self._taking.set()

    def _let_go(self, size: int | None) -> None:
        if size is not None:
            self._room.give(size)

    def _idle_for(self) -> float:
        """Seconds without a message or a step in flight."""
        return 0.0 if self._steps else monotonic() - self._heard

    async def _read(self, receive: Receive) -> None:
        while (request := await receive()) is not None:
            while len(self._outbox) >= self._limits.attend_inflight_steps_max:
                self._taking.clear()  # a client that only sends must not pile up answers here
                await self._taking.wait()
            self._heard = monotonic()
            body = request.WhichOneof("body")
            if body == "step":
                self._start(request.step)
            elif body == "bind":
                self._outbox.put(await self._bind(request.bind))
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
                self._known.clear()
            self._bound[bind.handle] = (info.name, info.generation)
            return pb.AttendResponse(handle=bind.handle, bound=pb.AttendBound(session=convert.session_to(info)))
        except Exception as error:
            return pb.AttendResponse(handle=bind.handle, error=status_of(error))

    def _start(self, step: pb.AttendStep) -> None:
        begun, data, size = monotonic(), step.q.data, None
        deadline = begun + step.timeout_ms / 1000
        try:
            self._admit(step, deadline)
            self._room.take(len(data))
            size = len(data)
            timer = asyncio.get_running_loop().call_later(step.timeout_ms / 1000, self._late, step)
            flying = StepInFlight(step.request_id, step.lse_base, timer, size, begun, len(step.items))
            self._steps[step.request_id] = flying
            self._bytes += size
            self._idle.clear()
            self._begin(flying, step, data, deadline)
        except Exception as error:
            if size is not None:
                if (flying := self._taken(step.request_id)) is None:
                    return  # it was answered with an error of the device
                flying.cancel()
            self._outbox.put(self._refusal(step.request_id, error, begun), size)

    def _begin(self, flying: StepInFlight, step: pb.AttendStep, data: bytes, deadline: float) -> None:
        """Asks for the answers of all items; only those of sessions that are not loaded need a task."""
        items, shape = step.items, tuple(step.q.shape)
        if len(items) == 1 and (known := self._known.get(_asked(step, items[0], shape))) is not None:
            q = convert.read_floats(data, known.dtype, known.shape, "step.q")
            tell = partial(self._told, flying, 0)
            told = self._querying.attend_prepared(self._tenant, known.prepared, q, deadline, tell)
            if told is not None:
                flying.parts.append(told)
                convert.check_finite(q, "step.q")  # while the device is busy with it
                return
        convert.chosen(convert.LSE_FACTORS, step.lse_base, "step.lse_base")
        q = convert.host_from(step.q, "step.q", dims=3)
        rows = [item.rows for item in items]
        if not rows or min(rows) < 1 or sum(rows) != shape[0]:
            raise InvalidArgument("step.items", f"rows {rows[:8]} do not add up to q's {shape[0]}")
        sessions, first = [self._session_of(item) for item in items], 0
        for place, (item, session) in enumerate(zip(items, sessions, strict=True)):
            part = HostArray(q.array[first : first + item.rows], q.dtype)
            tell = partial(self._told, flying, place)
            flying.parts.append(self._answer_of(step, item, session, part, deadline, tell))
            first += item.rows

    def _answer_of(
        self,
        step: pb.AttendStep,
        item: pb.AttendStep.Item,
        session: tuple[str, str],
        q: HostArray,
        deadline: float,
        tell: Tell,
    ) -> "Told[AttendAnswer] | asyncio.Task[AttendAnswer]":
        """Steps differ in their numbers; what they ask is checked once, until the session changes."""
        asked, debias = _asked(step, item, q.array.shape), step.debias if step.HasField("debias") else None
        known = self._known.get(asked)
        if known is not None:
            told = self._querying.attend_prepared(self._tenant, known.prepared, q, deadline, tell)
            if told is not None:
                return told
        query = Query(
            *session,
            layer=step.layer,
            end=item.end,
            q=q.tensor(),
            head_offset=step.head_offset,
            precision=convert.precision_from(step.precision),
            refine=step.refine,
        )
        prepared = self._querying.prepare(self._tenant, query, debias)
        if prepared is not None:
            while len(self._known) >= KNOWN_MAX:
                del self._known[next(iter(self._known))]
            self._known[asked] = Known(prepared, q.dtype, q.array.shape)
            told = self._querying.attend_prepared(self._tenant, prepared, q, deadline, tell)
            if told is not None:
                return told
        task = asyncio.ensure_future(self._querying.attend(self._tenant, query, debias, deadline))
        task.add_done_callback(partial(_tell_of, tell))
        return task

    def _session_of(self, item: pb.AttendStep.Item) -> tuple[str, str]:
        """Name and generation."""
        if item.handle not in self._bound:
            raise NotFound("HANDLE_NOT_BOUND", f"handle {item.handle} is not bound", handle=item.handle)
        return self._bound[item.handle]

    def _admit(self, step: pb.AttendStep, deadline: float) -> None:
        """Raises if the step may not come in."""
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
        if len(self._steps) >= limits.attend_inflight_steps_max:
            raise self._full("attend_inflight_steps_max", limits.attend_inflight_steps_max)
        if self._bytes >= limits.attend_inflight_bytes_max:
            raise self._full("attend_inflight_bytes_max", limits.attend_inflight_bytes_max)
        self._turns.check(deadline)

    @staticmethod
    def _full(what: str, limit: int) -> ResourceExhausted:
        text = f"{what} {limit} are in flight on this stream"
        return ResourceExhausted("BUSY", text, STEP_RETRY_SECONDS, bound=what, limit=limit)

    def _told(self, flying: StepInFlight, place: int, answer: AttendAnswer | None, error: BaseException | None) -> None:
        """One item of a step was answered."""
        request_id = flying.request_id
        if self._steps.get(request_id) is not flying:
            return
        if answer is not None:
            flying.answers[place] = answer
            flying.missing -= 1
            if flying.missing:
                return
        self._taken(request_id)
        if answer is None:
            flying.cancel()
            if not isinstance(error, Exception):
                raise error or AssertionError("neither an answer nor an error")
            self._outbox.put(self._refusal(request_id, error, flying.begun), flying.bytes)
            return
        answers = [answer] if len(flying.answers) == 1 else [flying.answers[each] for each in sorted(flying.answers)]
        self._outbox.put(encode_attended(request_id, answers, flying.lse_base), flying.bytes)
        self._telemetry.step("OK", monotonic() - flying.begun)

    def _late(self, step: pb.AttendStep) -> None:
        if self._drop(step.request_id):
            late = DeadlineExceeded("DEADLINE", f"the step took longer than {step.timeout_ms} ms")
            self._outbox.put(self._refusal(step.request_id, late, monotonic() - step.timeout_ms / 1000))

    def _refusal(self, request_id: int, error: Exception, begun: float) -> pb.AttendResponse:
        status = status_of(error)
        reason = error.reason if isinstance(error, KVStoreError) else ""
        self._telemetry.step(code_name(status.code), monotonic() - begun, reason)
        return pb.AttendResponse(request_id=request_id, error=status)

    def _drop(self, request_id: int) -> bool:
        """Lets go of a step that nobody waits for; False if it was answered already."""
        flying = self._taken(request_id)
        if flying is not None:
            flying.cancel()
            self._let_go(flying.bytes)
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


def _asked(step: pb.AttendStep, item: pb.AttendStep.Item, shape: tuple[int, ...]) -> Hashable:
    """Equal for items that ask the same of rows of this shape."""
    debias = step.debias if step.HasField("debias") else None
    levels = None
    if step.HasField("precision"):  # field by field: its bytes would have what somebody sends and nobody knows, too
        levels = step.precision.keys_level, step.precision.values_level, step.precision.require_precision
    what = step.layer, step.head_offset, step.refine, debias, levels, step.lse_base
    return item.handle, item.end, item.rows, step.q.dtype, shape, what


def _tell_of(tell: Tell, task: "asyncio.Task[AttendAnswer]") -> None:
    if not task.cancelled():
        error = task.exception()
        tell(None if error else task.result(), error)
