"""What queries ask for and what they answer."""

from dataclasses import dataclass

from torch import Tensor

from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import Kind
from kvstore_proto.v1 import kvstore_pb2 as pb


@dataclass(frozen=True)
class Precision:
    """A level of the codec for keys and for values; 0 is the finest."""

    keys_level: int = 0
    values_level: int = 0
    required: bool = False
    """Refuse (FailedPrecondition) rather than answer coarser than asked."""

    def to_proto(self) -> pb.Precision:
        return pb.Precision(keys_level=self.keys_level, values_level=self.values_level, require_precision=self.required)


FINEST = Precision()


@dataclass(frozen=True)
class Fidelity:
    """What an answer was computed from."""

    codec: str
    codec_fingerprint: str
    precision: Precision
    score_stderr: float
    """Standard error of a logit (after sm_scale), root mean square over the sketched keys and query rows."""
    exact: bool
    positions_beyond: int = 0
    """The last so many positions of the prefix are beyond what the layer's projections were calibrated for: their bases
    are worse there."""

    @classmethod
    def from_proto(cls, message: pb.Fidelity) -> "Fidelity":
        return cls(
            codec=message.codec,
            codec_fingerprint=message.codec_fingerprint,
            precision=Precision(message.precision.keys_level, message.precision.values_level),
            score_stderr=message.score_stderr,
            exact=message.exact,
            positions_beyond=message.positions_beyond,
        )


@dataclass(frozen=True)
class Attention:
    """`out` [T, heads, D] in q's dtype, normalised over [0, end); `lse` [T, heads] float32, natural logarithm."""

    out: Tensor
    lse: Tensor
    end: int
    fidelity: Fidelity


@dataclass(frozen=True)
class Scores:
    """float32 logits [T, heads, tokens] of positions [start, start + tokens)."""

    logits: Tensor
    start: int
    fidelity: Fidelity


@dataclass(frozen=True)
class TopK:
    """int64 `positions` and float32 `logits` [T, heads, min(k, end)], best first; ties: the lower position first."""

    positions: Tensor
    logits: Tensor
    end: int
    fidelity: Fidelity


@dataclass(frozen=True)
class Sketches:
    """Stored rows of positions [start, end) as they are, with what reads them.

    `parts[layer, kind]` holds rows [r, H, D] of the first r tokens in the session's dtype and the signs of the others;
    all are rows in dense layers and before the fit. `exact_end` and `fit` say how signs are read.
    """

    start: int
    end: int
    exact_end: int
    fit: Fit | None
    parts: dict[tuple[int, Kind], KindRows]
