"""The Attend stream: sessions bound to handles, many steps in flight, answers in any order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from time import monotonic

import torch

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.errors import DeadlineExceeded, InvalidArgument, KVStoreError, NotFound, ResourceExhausted
from kvstore_server.limits import Limits
from kvstore_server.rpc import convert
from kvstore_server.rpc.status import status_of
from kvstore_server.sessions.model import AttendAnswer, Query
from kvstore_server.sessions.querying import Querying

BUSY_RETRY_SECONDS = 0.01


class AttendStream:
    """One caller's stream. An error answers the step it belongs to and never ends the stream."""

    def __init__(self, querying: Querying, limits: Limits, tenant: str, draining: asyncio.Event) -> None:
        self._querying, self._limits, self._tenant, self._draining = querying, limits, tenant, draining
        self._bound: dict[int, tuple[str, str]] = {}
        self._steps: dict[int, asyncio.Task[None]] = {}
        self._bytes = 0
        self._answers: asyncio.Queue[pb.AttendResponse | None] = asyncio.Queue()

    async def run(self, requests: AsyncIterator[pb.AttendRequest]) -> AsyncIterator[pb.AttendResponse]:
        """Answers until the caller is done, has been idle too long, or the server drains."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                yield answer
            await reader
        finally:
            reader.cancel()
            for step in self._steps.values():
                step.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(reader, *self._steps.values(), return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.AttendRequest]) -> None:
        drained = asyncio.create_task(self._draining.wait())
        incoming = aiter(requests)
        try:
            while not drained.done():
                arriving = asyncio.ensure_future(anext(incoming, None))
                done, _ = await asyncio.wait(
                    {arriving, drained},
                    timeout=self._limits.attend_idle_seconds_max,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done and self._steps:
                    done, _ = await asyncio.wait({arriving, drained, *self._steps.values()})
                if arriving not in done:
                    arriving.cancel()
                    break
                if (request := arriving.result()) is None:
                    break
                await self._take(request)
            if drained.done():
                self._answers.put_nowait(pb.AttendResponse(going_away=pb.AttendGoingAway()))
            await asyncio.gather(*self._steps.values(), return_exceptions=True)
        finally:
            drained.cancel()
            self._answers.put_nowait(None)

    async def _take(self, request: pb.AttendRequest) -> None:
        body = request.WhichOneof("body")
        if body == "bind":
            self._answers.put_nowait(await self._bind(request.bind))
        elif body == "step":
            self._start(request.step)
        elif body == "cancel":
            if step := self._steps.get(request.cancel.request_id):
                step.cancel()
        else:
            raise InvalidArgument("body", "is none of bind, step and cancel")

    async def _bind(self, bind: pb.AttendBind) -> pb.AttendResponse:
        try:
            if bind.handle not in self._bound and len(self._bound) >= self._limits.attend_handles_max:
                limit = self._limits.attend_handles_max
                raise InvalidArgument("bind.handle", f"more than {limit} handles on one stream", limit=limit)
            generation = bind.generation if bind.HasField("generation") else None
            info = await self._querying.bind(self._tenant, bind.session, generation)
            self._bound[bind.handle] = (info.name, info.generation)
            return pb.AttendResponse(handle=bind.handle, bound=pb.AttendBound(session=convert.session_to(info)))
        except Exception as error:
            return pb.AttendResponse(handle=bind.handle, error=status_of(error))

    def _start(self, step: pb.AttendStep) -> None:
        try:
            self._admit(step)
        except KVStoreError as error:
            self._answers.put_nowait(pb.AttendResponse(request_id=step.request_id, error=status_of(error)))
            return
        self._bytes += len(step.q.data)
        task = asyncio.create_task(self._answer(step))
        self._steps[step.request_id] = task
        task.add_done_callback(lambda _: self._finish(step))

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

    def _finish(self, step: pb.AttendStep) -> None:
        self._bytes -= len(step.q.data)
        self._steps.pop(step.request_id, None)

    async def _answer(self, step: pb.AttendStep) -> None:
        response = pb.AttendResponse(request_id=step.request_id)
        try:
            async with asyncio.timeout(step.timeout_ms / 1000):
                response.result.CopyFrom(await self._attend(step, monotonic() + step.timeout_ms / 1000))
        except TimeoutError:
            late = DeadlineExceeded("DEADLINE", f"the step took longer than {step.timeout_ms} ms")
            response.error.CopyFrom(status_of(late))
        except Exception as error:
            response.error.CopyFrom(status_of(error))
        self._answers.put_nowait(response)

    async def _attend(self, step: pb.AttendStep, deadline: float) -> pb.AttendResult:
        queries = self._queries(step)
        debias = step.debias if step.HasField("debias") else None
        answers: list[AttendAnswer] = await asyncio.gather(
            *(self._querying.attend(self._tenant, query, debias, deadline) for query in queries)
        )
        factor = convert.chosen(convert.LSE_FACTORS, step.lse_base, "step.lse_base")
        items = [
            pb.AttendResult.Item(
                generation=answer.generation, length=answer.length, fidelity=convert.fidelity_to(answer.fidelity)
            )
            for answer in answers
        ]
        out = torch.cat([answer.out for answer in answers]).to(queries[0].q.dtype)
        lse = torch.cat([answer.lse for answer in answers]) * factor
        return pb.AttendResult(
            out=convert.tensor_to(out),
            lse=convert.tensor_to(lse),
            lse_base=step.lse_base or pb.LSE_BASE_E,
            lse_layout=pb.LSE_LAYOUT_TOKEN_MAJOR,
            items=items,
        )

    def _queries(self, step: pb.AttendStep) -> list[Query]:
        """One query per item: its rows of q, its session by handle."""
        q = convert.tensor_from(step.q, "step.q", dims=3)
        rows = [item.rows for item in step.items]
        if not rows or any(count < 1 for count in rows) or sum(rows) != q.shape[0]:
            raise InvalidArgument("step.items", f"rows {rows[:8]} do not add up to q's {q.shape[0]}")
        for item in step.items:
            if item.handle not in self._bound:
                raise NotFound("HANDLE_NOT_BOUND", f"handle {item.handle} is not bound", handle=item.handle)
        return [
            Query(
                *self._bound[item.handle],
                layer=step.layer,
                end=item.end,
                q=part,
                head_offset=step.head_offset,
                precision=convert.precision_from(step.precision),
            )
            for item, part in zip(step.items, q.split(rows), strict=True)
        ]
