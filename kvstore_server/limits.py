"""Every bound of the service. GetServerInfo publishes them; an error that names a limit names its field here."""

import re
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIB: Final = 1 << 20
PROTOCOL_OVERHEAD_BYTES: Final = 64 << 10
"""Room in one message for everything that is not a tensor's data."""

SESSION_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
Name = Annotated[str, Field(pattern=f"^(?:{SESSION_NAME.pattern})$")]
"""Of a tenant or a session, in settings and in what is stored."""
"""What a session may be called, for `fullmatch`. Names that start with `_` are the store's own."""

Count = Annotated[int, Field(ge=1, le=2**53)]
"""Bounded so that every reader of the published limits, JavaScript too, holds them exactly."""


class Limits(BaseModel):
    """Bounds on requests, queues and waits; all are at least 1 and whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    message_bytes_max: Annotated[int, Field(ge=MIB, le=1 << 30)] = 16 * MIB
    """One gRPC message, either way."""
    frame_bytes_max: Count = 4 * MIB
    """The data of one Append frame or one Fetch part."""

    append_tokens_max: Count = 16_384
    """Tokens of one append."""
    append_bytes_max: Count = 512 * MIB
    """The data of one append, all frames together."""
    append_block_hashes_max: Count = 4_096
    """Token-block hashes in one Append header."""
    appends_inflight_max: Count = 32
    """Appends that are received or committed at one time."""
    appends_inflight_bytes_max: Count = 1024 * MIB
    """Declared bytes of the appends in flight, together."""

    session_tokens_max: Count = 1 << 22
    """Length of a session."""
    projection_bytes_max: Count = 512 * MIB
    """One projection."""
    projections_inflight_max: Count = 4
    """PutProjection and GetProjection calls at one time: each holds a whole file."""
    codec_json_bytes_max: Count = 64 << 10
    """The codec of one CreateSession."""
    list_page_max: Count = 1_000
    """Sessions in one page of ListSessions."""

    layers_max: Annotated[int, Field(ge=1, le=1024)] = 256
    """Layers of a model."""
    kv_heads_max: Annotated[int, Field(ge=1, le=256)] = 128
    """KV heads of a layer."""
    query_heads_max: Annotated[int, Field(ge=1, le=1024)] = 256
    """Query heads of a layer."""

    query_rows_max: Count = 1_024
    """Query tokens in one Score, TopK or Attend step."""
    query_logits_max: Count = 1 << 31
    """Query tokens x query heads x stored tokens of one call or step: what it costs."""
    topk_max: Count = 4_096
    """k of one TopK, its oversampling counted in."""
    topk_results_max: Count = 1 << 20
    """Query tokens x query heads x k of one TopK, its oversampling counted in, or x `refine` of one Attend item."""
    fetch_bytes_max: Count = 1024 * MIB
    """The data of one Fetch, all parts together."""
    queries_inflight_max: Count = 256
    """Score and TopK calls that are queued or computed at one time."""
    queries_inflight_bytes_max: Count = 512 * MIB
    """Bytes of their requests, together."""
    fetches_inflight_max: Count = 256
    """Fetch and Prefetch calls at one time."""
    query_wait_ms_max: Count = 1_000
    """How long a query or step may have to wait for the device, by what is known when it comes."""

    attend_streams_max: Count = 256
    """Attend streams that are open at one time."""
    attend_handles_max: Count = 1_024
    """Sessions bound on one Attend stream."""
    attend_items_max: Count = 256
    """Items of one Attend step."""
    attend_inflight_steps_max: Count = 64
    """Steps of one Attend stream that are queued or computed."""
    attend_inflight_bytes_max: Count = 64 * MIB
    """Query bytes of those steps, together."""
    steps_inflight_max: Count = 4_096
    """Steps of all Attend streams that are queued or computed, or whose answers wait for the client to read."""
    steps_inflight_bytes_max: Count = 512 * MIB
    """Query bytes of those steps, together."""
    attend_idle_seconds_max: Count = 600
    """How long an Attend stream may say nothing."""
    attend_stream_seconds_max: Count = 600
    """After so long the client of an Attend stream is asked to open another."""

    calls_inflight_max: Count = 256
    """All other calls at one time, and Append besides its own bounds."""
    device_waiting_max: Count = 4_096
    """Pieces of work that wait for the device, of queries and of encoding each."""
    tenant_over_free_max: Count = 4
    """A tenant gets a place only while it holds at most so many times its weight of what is free, and bytes likewise:
    alone 4/5 of all, n that want everything 4 / (4 n + 1) each. Without identity there is one tenant, without bound."""

    deadline_default_seconds: Count = 30
    """For a call or step that names no deadline."""
    deadline_seconds_max: Count = 600
    """Longer deadlines are cut to this."""
    write_seconds_max: Count = 30
    """How long one message may wait for a client that does not read."""
    read_seconds_max: Count = 30
    """How long the next message of a request may be waited for, other than on an Attend stream."""

    keepalive_seconds: Count = 30
    """A connection that is silent for so long is probed."""
    keepalive_timeout_seconds: Count = 10
    """One that does not answer that for so long is gone, and the calls on it are cancelled."""
    connection_seconds_max: Count = 3_600
    """A connection takes no more calls after so long (a tenth more or less): the client opens another."""
    connection_grace_seconds: Count = 1_200
    """How long the calls on it may go on."""
    connection_calls_max: Count = 1_024
    """Calls on one connection at one time; a client keeps further ones back."""

    @model_validator(mode="after")
    def _consistent(self) -> "Limits":
        smaller_first = [
            ("frame_bytes_max", "append_bytes_max"),
            ("append_bytes_max", "appends_inflight_bytes_max"),
            ("append_tokens_max", "session_tokens_max"),
            ("deadline_default_seconds", "deadline_seconds_max"),
            ("message_bytes_max", "queries_inflight_bytes_max"),
            ("attend_inflight_bytes_max", "steps_inflight_bytes_max"),
        ]
        for small, large in smaller_first:
            if getattr(self, small) > getattr(self, large):
                raise ValueError(f"{small} {getattr(self, small)} is more than {large} {getattr(self, large)}")
        if self.frame_bytes_max + PROTOCOL_OVERHEAD_BYTES > self.message_bytes_max:
            raise ValueError(f"a frame of frame_bytes_max {self.frame_bytes_max} does not fit message_bytes_max")
        if self.attend_stream_seconds_max + self.deadline_seconds_max > self.connection_grace_seconds:
            raise ValueError(
                f"connection_grace_seconds {self.connection_grace_seconds} cuts off Attend streams: it must be "
                "attend_stream_seconds_max and deadline_seconds_max together"
            )
        return self

    def as_dict(self) -> dict[str, int]:
        """Name to value, as GetServerInfo publishes them."""
        return self.model_dump()
