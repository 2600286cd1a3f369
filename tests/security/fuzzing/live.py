"""Plays fuzzed calls on a live server, several at a time, and says what a caller must never see."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.rpc.handlers import SERVICE
from kvstore_server.rpc.status import DETAILS_KEY, code_name

from .cases import Case, stocked
from .requests import append, create

SECONDS_MAX = 20.0
AT_ONCE = 8
BATCH = 100
"""Cases between two looks at everything else, for which the sessions are made anew."""
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
WALKED_AWAY = "the caller walked away"
ALLOWED = {
    *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "OUT_OF_RANGE", "FAILED_PRECONDITION", "ABORTED"),
    *("RESOURCE_EXHAUSTED", WALKED_AWAY),
}
"""Nothing is lost, draining, slow or secret here, and no bug is ours: other codes are findings."""
ALLOWED_OF_A_STEP = ALLOWED | {"DEADLINE_EXCEEDED"}
"""Its `timeout_ms` may be 1."""


@dataclass(frozen=True)
class Reply:
    """The code of the call, those within an Attend stream, its messages, and whether an error says what it is."""

    code: str
    steps: tuple[str, ...] = ()
    messages: tuple[bytes, ...] = ()
    text: str = ""
    explained: bool = True

    @property
    def complaints(self) -> list[str]:
        hang = [f"no answer within {SECONDS_MAX} s"] if self.code == "DEADLINE_EXCEEDED" else []
        wrong = [] if self.code in ALLOWED or hang else [f"answered {self.code}: {self.text[:200]}"]
        inside = [f"a step is answered {code}" for code in self.steps if code not in ALLOWED_OF_A_STEP]
        return [*hang, *wrong, *inside, *([] if self.explained else [f"{self.code} without ErrorInfo"])]


@dataclass
class Findings:
    """`codes` counts what each method was answered."""

    cases: int = 0
    codes: dict[str, Counter[str]] = field(default_factory=dict)
    complaints: list[tuple[Case, str]] = field(default_factory=list)

    def add(self, case: Case, reply: Reply) -> None:
        self.cases += 1
        self.codes.setdefault(case.method, Counter()).update([reply.code, *reply.steps])
        self.complaints += [(case, complaint) for complaint in reply.complaints]


class Caller:
    """Sends bytes as any method and takes what comes; as one tenant.

    Each call has a thread: gRPC's asyncio client answers INTERNAL of its own where a server ends a call before it has
    read everything (github.com/grpc/grpc/issues/36066).
    """

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._threads = ThreadPoolExecutor(AT_ONCE)

    async def ask(self, method: str, messages: Sequence[bytes], cancel_after: int | None = None) -> Reply:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, method, messages, cancel_after)

    async def must(self, method: str, requests: Sequence[Any]) -> tuple[bytes, ...]:
        """The answers of a call that has to succeed."""
        reply = await self.ask(method, [each.SerializeToString() for each in requests])
        assert (reply.code, set(reply.steps) - {"OK"}) == ("OK", set()), f"{method} is answered {reply}"
        return reply.messages

    def _ask(self, method: str, messages: Sequence[bytes], cancel_after: int | None) -> Reply:
        send = self._channel.stream_stream(f"/{SERVICE.full_name}/{method}")
        begun, walked_away = Event(), Event()

        def requests() -> Iterator[bytes]:
            yield from messages[:cancel_after]
            if cancel_after is not None:
                walked_away.set()
                begun.wait(SECONDS_MAX)
                call.cancel()

        call: Any = send(requests(), metadata=self._metadata, timeout=SECONDS_MAX)
        begun.set()
        try:
            replies = list(call)
        except grpc.RpcError:
            code = call.code().name
            if code == "CANCELLED" and walked_away.is_set():
                return Reply(WALKED_AWAY)
            return Reply(code, text=call.details() or "", explained=_is_explained(call))
        return Reply("OK", tuple(_steps(method, replies)), tuple(replies))


def _steps(method: str, replies: Sequence[bytes]) -> Iterator[str]:
    for reply in replies if method == "Attend" else ():
        yield code_name(pb.AttendResponse.FromString(reply).error.code)


def _is_explained(call: Any) -> bool:
    """Whether our own details say what is wrong. A message over the limit is refused by gRPC itself."""
    if "larger than max" in (call.details() or "") or call.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return True
    trailers = dict(call.trailing_metadata() or ())
    details = status_pb2.Status.FromString(trailers.get(DETAILS_KEY, b"")).details
    return any(detail.Unpack(error_details_pb2.ErrorInfo()) for detail in details)


async def stock_up(caller: Caller) -> None:
    """Every session that cases are about, as new."""

    async def one(number: int, name: str) -> None:
        await caller.must("DeleteSession", [pb.DeleteSessionRequest(name=name)])
        await caller.must("CreateSession", create(name))
        # One exact token, those of the fit, and then some that are stored as sketches.
        await caller.must("Append", append(name, 0, 5, number))
        await caller.must("Append", append(name, 5, 1, number + 1_000))

    await asyncio.gather(*(one(number, name) for number, name in enumerate(stocked())))


async def play(caller: Caller, cases: Sequence[Case], findings: Findings) -> None:
    """All of them, AT_ONCE at a time."""
    waiting = iter(cases)

    async def work() -> None:
        for case in waiting:
            findings.add(case, await caller.ask(case.method, case.messages, case.cancel_after))

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
