"""Rows of a quality table by name, such as `keys:matryoshka:3@1`, `both:rotated:3` or `keys:projected:0.5`.

A name has the kinds, the codec, how much of it and, after `@`, the level that is read. A fitted codec takes the
projection that is given; `keys:matryoshka:2:own` fits each text's own first tokens, which stay exact, in the metric of
the projection if there is one with metrics.
"""

import re
from dataclasses import dataclass

import torch

from kvstore_client.projections.attention import SINK_TOKENS
from kvstore_client.projections.quality import CodedAttention, Seen
from kvstore_codecs.artifact import Projection
from kvstore_codecs.describe import Bits, describe
from kvstore_codecs.fit import fit_session
from kvstore_codecs.plan import CodecPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import (
    BASIS_FIT_TOKENS_MIN,
    AnyCodec,
    CodecSpec,
    Matryoshka,
    ModelShape,
    Projected,
    Qjl,
    Raw,
    Rotated,
)
from kvstore_kernels.backend import Backend

DEFAULT = (
    "keys:rotated:2",
    "keys:rotated:3",
    "keys:matryoshka:1",
    "keys:matryoshka:2",
    "keys:matryoshka:3",
    "keys:matryoshka:3@1",
    "both:rotated:2",
    "both:matryoshka:1.5",
    "both:matryoshka:2",
    "both:matryoshka:2.75",
)
_ROW = re.compile(r"(keys|values|both):(qjl|rotated|matryoshka|projected):([0-9.]+)(:own)?(?:@([0-9]))?")


@dataclass(frozen=True)
class CodecRow:
    """One row for models of `shape`; without session statistics the plan is the same for all texts."""

    kinds: str
    codec: AnyCodec
    level: int
    own: bool
    shape: ModelShape
    projections: tuple[Projection, ...]
    backend: Backend

    @classmethod
    def parse(cls, text: str, shape: ModelShape, projection: Projection | None, backend: Backend) -> "CodecRow":
        """ValueError for a text that is no row, or that needs a projection where none is given."""
        match = _ROW.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no row such as keys:matryoshka:2")
        kinds, name, amount, own, level = match.groups()
        fitted = name in ("matryoshka", "projected")
        if fitted and own is None and projection is None:
            raise ValueError(f"{text} needs a projection")
        used = projection if fitted and projection and (own is None or projection.header.has_metrics) else None
        basis = f"{'session' if own else 'projection'}:{used.sha256}" if used else "session"
        codec = _codec(name, float(amount), basis, shape.head_dim)
        return cls(kinds, codec, int(level or 0), own is not None, shape, (used,) if used else (), backend)

    @property
    def spec(self) -> CodecSpec:
        """Codecs without a mean of their own take the session's."""
        given = isinstance(self.codec, Matryoshka | Projected) and not self.own
        keys, values = (self.codec if self.kinds in (kind, "both") else Raw() for kind in ("keys", "values"))
        return CodecSpec(
            keys=keys,
            values=values,
            sink_tokens=SINK_TOKENS,
            mean="none" if given else "session",
            fit_tokens=BASIS_FIT_TOKENS_MIN,
        )

    def plan(self, seen: Seen) -> CodecPlan:
        spec, fit = self.spec, None
        if spec.needs_fit:
            end = SINK_TOKENS + (BASIS_FIT_TOKENS_MIN if self.own else seen.keys.shape[1])
            keys, values = (x[:, SINK_TOKENS:end] for x in (seen.keys, seen.values))
            fit = fit_session(spec, keys, values, SINK_TOKENS, self.projections)
        return plan_for(spec, self.shape, fit, self.projections)

    def __call__(self, seen: Seen) -> CodedAttention:
        exact_end = SINK_TOKENS + BASIS_FIT_TOKENS_MIN if self.own else SINK_TOKENS
        return CodedAttention(self.plan(seen), self.backend, level=self.level, exact_end=exact_end)

    def bits(self) -> Bits:
        """Of the kinds that are coded, at full depth."""
        tokens = SINK_TOKENS + BASIS_FIT_TOKENS_MIN
        noise = torch.randn(self.shape.layers, tokens, self.shape.kv_heads, self.shape.head_dim)
        return describe(self.plan(Seen(noise, noise)))[self.kinds]


def _codec(name: str, amount: float, basis: str, head_dim: int) -> AnyCodec:
    match name:
        case "qjl":
            return Qjl(bits=int(amount * head_dim))
        case "rotated":
            return Rotated(planes=int(amount))
        case "matryoshka":
            return Matryoshka(bits=amount, basis=basis)
    return Projected(share=amount, basis=basis)
