"""The Attend stream: sessions bound to handles, many steps in flight, answers in any order.

A step of sessions that are loaded costs neither a task nor a wait of its own: it goes to the device from the task that
reads the stream, and its answer comes back as a callback.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TypeAlias

from google.protobuf.message import DecodeError

from kvstore_kernels.host import HostArray
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.errors import DeadlineExceeded, InvalidArgument, KVStoreError, NotFound, ResourceExhausted
from kvstore_server.limits import Limits
from kvstore_server.rpc import convert
from kvstore_server.rpc.admission import STEP_RETRY_SECONDS, Admission
from kvstore_server.rpc.attend_repeats import Repeats
from kvstore_server.rpc.attend_replies import encode_attended
from kvstore_server.rpc.attend_steps import Begin, Known, StepInFlight, Terms, asked_of
from kvstore_server.rpc.outbox import Outbox
from kvstore_server.rpc.status import code_name, malformed, status_of
from kvstore_server.scheduling.completion import Told
from kvstore_server.sessions.model import AttendAnswer, Query
from kvstore_server.sessions.querying import Prepared, Querying, Tell
from kvstore_server.telemetry import Telemetry

Receive: TypeAlias = Callable[[], Awaitable[bytes | None]]
"""The bytes of the next AttendRequest; None at the end."""
KNOWN_MAX = 1024
"""Kinds of items that a stream remembers: a few for each layer of each session."""


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
        self._known: dict[Hashable, Prepared] = {}
        """What items ask, whatever their numbers."""
        self._repeats = Repeats[Known]()
        self._steps: dict[int, StepInFlight] = {}
        self._bytes = 0
        self._heard = monotonic()
        self._idle = asyncio.Event()
        self._idle.set()
        self._taking = asyncio.Event()
        self._watch: asyncio.TimerHandle | None = None
        self._watched = 0.0
        """The deadline for which it is set."""
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
                if self._watch is not None:
                    self._watch.cancel()
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
        while (message := await receive()) is not None:
            while len(self._outbox) >= self._limits.attend_inflight_steps_max:
                self._taking.clear()  # a client that only sends must not pile up answers here
                await self._taking.wait()
            self._heard = monotonic()
            if (found := self._repeats.find(message)) is not None:
                request_id, data, known = found
                self._start(request_id, known.terms, data, partial(self._repeat, message, known))
                await asyncio.sleep(0)  # looking for its answer comes before asking for the next message
                continue
            request = _parsed(message)
            body = request.WhichOneof("body")
            if body == "step":
                step = request.step
                terms = Terms(step.timeout_ms, step.lse_base, len(step.items))
                self._start(step.request_id, terms, step.q.data, partial(self._begin, message, step))
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
                self._repeats.clear()
            self._bound[bind.handle] = (info.name, info.generation)
            return pb.AttendResponse(handle=bind.handle, bound=pb.AttendBound(session=convert.session_to(info)))
        except Exception as error:
            return pb.AttendResponse(handle=bind.handle, error=status_of(error))

    def _start(self, request_id: int, terms: Terms, data: bytes, begin: Begin) -> None:
        begun, size = monotonic(), None
        deadline = begun + terms.timeout_ms / 1000
        try:
            self._admit(request_id, terms, deadline)
            self._room.take(len(data))
            size = len(data)
            flying = StepInFlight(request_id, terms, size, begun, deadline, terms.items)
            self._steps[request_id] = flying
            self._bytes += size
            self._idle.clear()
            begin(flying, data)
            self._watch_for(deadline)
        except Exception as error:
            if size is not None:
                if (flying := self._taken(request_id)) is None:
                    return  # it was answered with an error of the device
                flying.cancel()
            self._outbox.put(self._refusal(request_id, error, begun), size)

    def _repeat(self, message: bytes, known: Known, flying: StepInFlight, data: bytes) -> None:
        """A step of which all but q was looked at before."""
        if len(data) != known.bytes:
            raise InvalidArgument("step.q.data", f"{len(data)} bytes instead of {known.bytes}")
        q = HostArray.read(data, known.dtype, known.shape)
        tell = partial(self._told, flying, 0)
        told = self._querying.attend_prepared(self._tenant, known.prepared, q, flying.deadline, tell)
        if told is None:
            self._begin(message, _parsed(message).step, flying, data)
            return
        flying.parts.append(told)
        convert.check_finite(q, "step.q")  # while the device is busy with it

    def _begin(self, message: bytes, step: pb.AttendStep, flying: StepInFlight, data: bytes) -> None:
        """Asks for the answers of all items; only those of sessions that are not loaded need a task."""
        items, shape = step.items, tuple(step.q.shape)
        convert.chosen(convert.LSE_FACTORS, step.lse_base, "step.lse_base")
        q = convert.host_from(step.q, "step.q", dims=3)
        rows = [item.rows for item in items]
        if not rows or min(rows) < 1 or sum(rows) != shape[0]:
            raise InvalidArgument("step.items", f"rows {rows[:8]} do not add up to q's {shape[0]}")
        sessions, first = [self._session_of(item) for item in items], 0
        for place, (item, session) in enumerate(zip(items, sessions, strict=True)):
            part = HostArray(q.array[first : first + item.rows], q.dtype)
            tell = partial(self._told, flying, place)
            flying.parts.append(self._answer_of(step, item, session, part, flying.deadline, tell))
            first += item.rows
        if len(items) == 1 and (prepared := self._known.get(asked_of(step, items[0], shape))) is not None:
            self._repeats.keep(message, Known(flying.terms, prepared, q.dtype, shape, len(data)))

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
        asked, debias = asked_of(step, item, q.array.shape), step.debias if step.HasField("debias") else None
        known = self._known.get(asked)
        if known is not None:
            told = self._querying.attend_prepared(self._tenant, known, q, deadline, tell)
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
            self._known[asked] = prepared
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

    def _admit(self, request_id: int, terms: Terms, deadline: float) -> None:
        """Raises if the step may not come in."""
        limits = self._limits
        if terms.items > limits.attend_items_max:
            limit = limits.attend_items_max
            raise InvalidArgument("step.items", f"{terms.items} items are more than {limit}", limit=limit)
        if request_id in self._steps:
            raise InvalidArgument("step.request_id", f"{request_id} is in flight already")
        if not 1 <= terms.timeout_ms <= limits.deadline_seconds_max * 1000:
            raise InvalidArgument(
                "step.timeout_ms",
                f"{terms.timeout_ms} is outside [1, {limits.deadline_seconds_max * 1000}]",
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
        if answer is None:
            self._taken(request_id)
            flying.cancel()
            if not isinstance(error, Exception):
                raise error or AssertionError("neither an answer nor an error")
            self._outbox.put(self._refusal(request_id, error, flying.begun), flying.bytes)
            return
        answers = [answer] if len(flying.answers) == 1 else [flying.answers[each] for each in sorted(flying.answers)]
        self._outbox.put(encode_attended(request_id, answers, flying.terms.lse_base), flying.bytes)
        self._taken(request_id)
        self._telemetry.step("OK", monotonic() - flying.begun)

    def _watch_for(self, deadline: float) -> None:
        """One timer for all steps: most are answered long before it could end them."""
        if self._watch is None or deadline < self._watched:
            if self._watch is not None:
                self._watch.cancel()
            self._watched = deadline
            left = max(deadline - monotonic(), 0.001)
            self._watch = asyncio.get_running_loop().call_later(left, self._end_late)

    def _end_late(self) -> None:
        self._watch, now = None, monotonic()
        for flying in [each for each in self._steps.values() if each.deadline <= now]:
            self._drop(flying.request_id)
            late = DeadlineExceeded("DEADLINE", f"the step took longer than {flying.terms.timeout_ms} ms")
            self._outbox.put(self._refusal(flying.request_id, late, flying.begun))
        if self._steps:
            self._watch_for(min(each.deadline for each in self._steps.values()))

    def _refusal(self, request_id: int, error: Exception, begun: float) -> pb.AttendResponse:
        status = status_of(error)
        reason = error.reason if isinstance(error, KVStoreError) else ""
        self._telemetry.step(code_name(status.code), monotonic() - begun, reason)
        return pb.AttendResponse(request_id=request_id, error=status)

    def _drop(self, request_id: int) -> None:
        """Lets go of a step that nobody waits for, if it was not answered already."""
        flying = self._taken(request_id)
        if flying is not None:
            flying.cancel()
            self._let_go(flying.bytes)

    def _taken(self, request_id: int) -> StepInFlight | None:
        flying = self._steps.pop(request_id, None)
        if flying is not None:
            self._bytes -= flying.bytes
            if not self._steps:
                self._heard = monotonic()
                self._idle.set()
        return flying


def _parsed(message: bytes) -> pb.AttendRequest:
    try:
        return pb.AttendRequest.FromString(message)
    except DecodeError:
        raise malformed() from None


def _tell_of(tell: Tell, task: "asyncio.Task[AttendAnswer]") -> None:
    if not task.cancelled():
        error = task.exception()
        tell(None if error else task.result(), error)
