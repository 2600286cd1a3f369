"""Every way a call can fail: one class per code, named as the server names them.

KVStoreError                code                  the same call again?
|- InvalidArgument          INVALID_ARGUMENT      no: names the field and the limit
|- Unauthenticated          UNAUTHENTICATED       no
|- PermissionDenied         PERMISSION_DENIED     no
|- NotFound                 NOT_FOUND             after reading
|- AlreadyExists            ALREADY_EXISTS        no: other bytes (or another spec) are there
|- OutOfRange               OUT_OF_RANGE          after reading the length it names
|- FailedPrecondition       FAILED_PRECONDITION   after reading: codec, shape, fit or format differs
|- Aborted                  ABORTED               no: the generation is gone, start again
|- ResourceExhausted        RESOURCE_EXHAUSTED    yes, after retry_after_seconds where it is set
|- Cancelled                CANCELLED             yes: the outcome is unknown
|- DeadlineExceeded         DEADLINE_EXCEEDED     yes: the outcome is unknown
|- Unavailable              UNAVAILABLE           yes: the outcome is unknown, or the server drains
|- DataLoss                 DATA_LOSS             no: names the damaged range
|- Unimplemented            UNIMPLEMENTED         no: this server does not have it
|- Internal                 INTERNAL              no: a bug; the text holds an incident id
`- Unknown                  UNKNOWN               no: something between us and the server answered
"""

from collections.abc import Mapping
from typing import ClassVar

from google.protobuf.message import DecodeError
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status


class KVStoreError(Exception):
    """A failure: `reason` for machines, the text for people, `facts` (field, limit, length, ...) for both."""

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        text: str,
        *,
        reason: str = "",
        facts: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.facts = dict(facts or {})
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.code}: {self.args[0]}"


class InvalidArgument(KVStoreError):
    """Raised by the server and, before anything is sent, by this library. The fact `field` names what is wrong."""

    code = "INVALID_ARGUMENT"


class Unauthenticated(KVStoreError):
    code = "UNAUTHENTICATED"


class PermissionDenied(KVStoreError):
    code = "PERMISSION_DENIED"


class NotFound(KVStoreError):
    code = "NOT_FOUND"


class AlreadyExists(KVStoreError):
    code = "ALREADY_EXISTS"


class OutOfRange(KVStoreError):
    code = "OUT_OF_RANGE"

    @property
    def length(self) -> int | None:
        """The session's length, where the server names it."""
        text = self.facts.get("length", "")
        return int(text) if text.isdecimal() else None


class FailedPrecondition(KVStoreError):
    code = "FAILED_PRECONDITION"


class Aborted(KVStoreError):
    code = "ABORTED"


class ResourceExhausted(KVStoreError):
    code = "RESOURCE_EXHAUSTED"


CLOSED = "CLOSED"


class Cancelled(KVStoreError):
    """By the server as it stops, or with the reason CLOSED because this client was closed."""

    code = "CANCELLED"


class DeadlineExceeded(KVStoreError):
    code = "DEADLINE_EXCEEDED"


class Unavailable(KVStoreError):
    code = "UNAVAILABLE"


class DataLoss(KVStoreError):
    """The facts `session`, `token_start` and `token_end` name what is damaged."""

    code = "DATA_LOSS"


class Unimplemented(KVStoreError):
    code = "UNIMPLEMENTED"


class Internal(KVStoreError):
    code = "INTERNAL"


class Unknown(KVStoreError):
    code = "UNKNOWN"


BY_CODE: dict[int, type[KVStoreError]] = {
    code_pb2.Code.Value(kind.code): kind for kind in KVStoreError.__subclasses__()
}


def from_status(status: Status) -> KVStoreError:
    """The exception of a google.rpc.Status; a detail that cannot be read is left out, the code never."""
    info, retry = ErrorInfo(), RetryInfo()
    for detail in status.details:
        for message in (info, retry):
            try:
                detail.Unpack(message)
            except DecodeError:
                message.Clear()
    delay = retry.retry_delay
    return BY_CODE.get(status.code, Unknown)(
        status.message,
        reason=info.reason,
        facts=info.metadata,
        retry_after_seconds=delay.seconds + delay.nanos / 1e9 if retry.HasField("retry_delay") else None,
    )


def invalid(field: str, text: str, **facts: object) -> InvalidArgument:
    """What this library raises for an argument that the server would refuse too."""
    values = {name: str(value) for name, value in facts.items()}
    return InvalidArgument(f"{field}: {text}", reason="INVALID_ARGUMENT", facts={"field": field, **values})
