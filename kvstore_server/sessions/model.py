"""Plain values that cross the border between rpc and sessions."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from kvstore_codecs.plan import Fit
from kvstore_codecs.spec import CodecSpec, Kind, ModelShape
from kvstore_kernels.host import HostArray
from kvstore_server.storage.geometry import Part


@dataclass(frozen=True)
class SessionInfo:
    """What there is to know about one session."""

    name: str
    generation: str
    length: int
    shape: ModelShape
    spec: CodecSpec
    fitted: bool
    exact_end: int
    fit_fingerprint: str
    ttl_seconds: float | None
    pinned: bool
    created_unix_seconds: float
    stored_bytes: int
    forked_from: str | None
    forked_at: int | None
    affinity: str
    max_position: int | None
    """Positions beyond were calibrated by no projection of the codec; None if it names none."""

    @property
    def raw_bytes(self) -> int:
        return self.length * self.shape.raw_bytes_per_token


@dataclass(frozen=True)
class AppendResult:
    generation: str
    length: int
    already_present: bool
    digest: bytes
    stored_bytes: int


@dataclass(frozen=True)
class Precision:
    """A level for keys and for values, 0 the finest; `required` refuses an answer that is coarser than asked."""

    keys_level: int = 0
    values_level: int = 0
    required: bool = False


@dataclass(frozen=True)
class Query:
    """Rows of one layer against the prefix [0, end) of one session: q is [T, heads, D], heads from `head_offset` on."""

    session: str
    generation: str | None
    layer: int
    end: int
    q: Tensor
    head_offset: int
    precision: Precision
    refine: int = 0
    """Of an attention: how many of the best tokens at `precision` are read at the finest level."""


class Fidelity(NamedTuple):
    """What an answer was computed from; `score_stderr` is the standard error of a logit, rms over keys and rows.

    The last `positions_beyond` of the prefix are sketched and at or beyond the lowest max_position of the projections
    that the layer's codecs name.
    """

    codec: str
    codec_fingerprint: str
    precision: Precision
    exact: bool
    positions_beyond: int
    score_stderr: float = 0.0


class AttendAnswer(NamedTuple):
    """out [T, heads, D] in q's dtype and natural-log lse float32 [T, heads], over the remote tokens only."""

    out: HostArray
    lse: HostArray
    generation: str
    length: int
    fidelity: Fidelity


@dataclass(frozen=True)
class ScoreAnswer:
    """float32 logits [T, heads, tokens] of positions [start, start + tokens)."""

    scores: Tensor
    start: int
    generation: str
    length: int
    fidelity: Fidelity


@dataclass(frozen=True)
class TopKAnswer:
    positions: Tensor
    scores: Tensor
    generation: str
    length: int
    fidelity: Fidelity


FetchedPart = Part | Literal["basis", "weights"]


@dataclass(frozen=True)
class FetchPart:
    """Tokens from `start` on of one layer and kind, or of its basis heads."""

    layer: int
    kind: Kind
    part: FetchedPart
    start: int
    tensor: Tensor


@dataclass(frozen=True)
class FetchAnswer:
    info: SessionInfo
    fit: Fit | None
    parts: AsyncGenerator[FetchPart]
