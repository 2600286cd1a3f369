"""Every way a call can fail, as one table.

    KVStoreError                code                  the same call again?
    |- InvalidArgument          INVALID_ARGUMENT      no: names the field and the limit
    |- Unauthenticated          UNAUTHENTICATED       no: there is no valid key or certificate
    |- PermissionDenied         PERMISSION_DENIED     no: the role does not allow the call, whatever it is about
    |- NotFound                 NOT_FOUND             after reading, also for what another tenant has
    |- AlreadyExists            ALREADY_EXISTS        no: other bytes (or another spec) are there
    |- OutOfRange               OUT_OF_RANGE          after reading the length it names
    |- FailedPrecondition       FAILED_PRECONDITION   after reading: codec, shape, fit or format differs
    |- Aborted                  ABORTED               no: the generation is gone, start again
    |- ResourceExhausted        RESOURCE_EXHAUSTED    yes, after retry_after_seconds
    |- DeadlineExceeded         DEADLINE_EXCEEDED     yes: the outcome is unknown
    |- Unavailable              UNAVAILABLE           yes: the outcome is unknown, or the server drains
    |- DataLoss                 DATA_LOSS             no: names the damaged range
    `- Unimplemented            UNIMPLEMENTED         no: this server does not have it

Anything else that is raised is our bug: it answers INTERNAL with an incident id, and only the log says more.
"""

from typing import ClassVar


class KVStoreError(Exception):
    """A failure with a fixed code, a reason for machines, a text for people and facts (strings) for both."""

    code: ClassVar[str] = "INTERNAL"

    def __init__(self, reason: str, text: str, **facts: object) -> None:
        super().__init__(text)
        self.reason = reason
        self.facts = {name: str(value) for name, value in facts.items()}


class InvalidArgument(KVStoreError):
    """`field` names what is wrong; a broken limit comes as `limit`."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, text: str, **facts: object) -> None:
        super().__init__("INVALID_ARGUMENT", f"{field}: {text}", field=field, **facts)


class Unauthenticated(KVStoreError):
    code = "UNAUTHENTICATED"


class PermissionDenied(KVStoreError):
    code = "PERMISSION_DENIED"


class NotFound(KVStoreError):
    code = "NOT_FOUND"


class AlreadyExists(KVStoreError):
    code = "ALREADY_EXISTS"


class OutOfRange(KVStoreError):
    """The fact `length` is the session's length."""

    code = "OUT_OF_RANGE"


class FailedPrecondition(KVStoreError):
    code = "FAILED_PRECONDITION"


class Aborted(KVStoreError):
    code = "ABORTED"


class ResourceExhausted(KVStoreError):
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, reason: str, text: str, retry_after_seconds: float, **facts: object) -> None:
        super().__init__(reason, text, **facts)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(KVStoreError):
    code = "DEADLINE_EXCEEDED"


class Unavailable(KVStoreError):
    code = "UNAVAILABLE"


class DataLoss(KVStoreError):
    """Facts `session`, `token_start` and `token_end` name what is damaged."""

    code = "DATA_LOSS"


class Unimplemented(KVStoreError):
    code = "UNIMPLEMENTED"
