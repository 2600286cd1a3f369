"""Domain errors as gRPC statuses with google.rpc details, and everything else as an incident."""

import logging
import secrets

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from kvstore_server.errors import InvalidArgument, KVStoreError, ResourceExhausted

LOG = logging.getLogger(__name__)
DOMAIN = "kvstore"
DETAILS_KEY = "grpc-status-details-bin"
TEXT_CHARACTERS_MAX = 400
FACT_CHARACTERS_MAX = 128
"""They may repeat what a caller sent. gRPC drops a status whose trailers are over 8 KiB, code and all."""


def malformed() -> InvalidArgument:
    """Of bytes that protobuf cannot read."""
    return InvalidArgument("message", "the bytes are not a message of this method")


def status_of(error: BaseException) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo (reason, facts) and, for RESOURCE_EXHAUSTED, RetryInfo.

    An error that is not ours answers INTERNAL with an incident id; the log has its traceback under that id.
    """
    if not isinstance(error, KVStoreError):
        incident = secrets.token_hex(8)
        LOG.error("incident %s", incident, exc_info=error)
        return status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message=f"internal error, incident {incident}")
    code, text = grpc.StatusCode[error.code].value[0], str(error)[:TEXT_CHARACTERS_MAX]
    status = status_pb2.Status(code=code, message=text)
    facts = {name: value[:FACT_CHARACTERS_MAX] for name, value in error.facts.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts)
    status.details.add().Pack(info)
    if isinstance(error, ResourceExhausted):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def code_name(number: int) -> str:
    """Such as UNAVAILABLE of 14."""
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


def trailers_of(status: status_pb2.Status) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata that carries the details, and pushback for gRPC's own retries."""
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            trailers.append(("grpc-retry-pushback-ms", str(retry.retry_delay.ToMilliseconds())))
    return tuple(trailers)


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> None:
    """Ends the call with the status of `error`; never returns."""
    status = status_of(error)
    code = next(c for c in grpc.StatusCode if c.value[0] == status.code)
    await context.abort(code, status.message, trailers_of(status))
