"""Rows of a quality table by name, such as `keys:matryoshka:3@1`, `both:rotated:3` or `keys:projected:0.5:pca`.

A name has the kinds, the codec, how much of it, for a fitted codec the name of a projection (without it the first one)
and, after `@`, the level that is read. `own` in place of a projection fits each text's own first 512 tokens, which
stay exact; `own+NAME` does so in the metric and with the budgets of a projection. `paper` is QJL as published: rows by
head_dim of keys that are not centred with the norm as scale, and values of 2 bits in groups of 32.
"""

import re
from collections.abc import Mapping
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
    KINDS,
    Affine,
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
_ROW = re.compile(
    r"(keys|values|both):(paper|qjl|rotated|affine|matryoshka|projected):([0-9.]+)(?::([\w.-]+(?:\+[\w.-]+)?))?(?:@([0-9]))?"
)
Projections = Mapping[str, Projection]


@dataclass(frozen=True)
class CodecRow:
    """One row for models of `shape`; without session statistics the plan is the same for all texts."""

    kinds: str
    codecs: tuple[AnyCodec, AnyCodec]
    level: int
    own: bool
    centred: bool
    shape: ModelShape
    projections: tuple[Projection, ...]
    backend: Backend

    @classmethod
    def parse(cls, text: str, shape: ModelShape, known: Projections, backend: Backend) -> "CodecRow":
        """ValueError for a text that is no row, or that names a projection that is not given."""
        match = _ROW.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no row such as keys:matryoshka:2")
        kinds, name, amount, basis, level = match.groups()
        own, _, metric = (basis or "").partition("+")
        used = _projection(text, name, metric if own == "own" else basis, own == "own", known)
        source = f"{'session' if own == 'own' else 'projection'}:{used.sha256}" if used else "session"
        codec = _codec(name, float(amount), source, shape.head_dim)
        pair = (codec, Affine(planes=2)) if name == "paper" else (codec, codec)
        chosen = tuple(c if kinds in (kind, "both") else Raw() for kind, c in zip(KINDS, pair, strict=True))
        given = name in ("matryoshka", "projected") and own != "own"
        own_tokens = own == "own"
        return cls(
            kinds,
            (chosen[0], chosen[1]),
            int(level or 0),
            own_tokens,
            not given and name != "paper",
            shape,
            (used,) if used else (),
            backend,
        )

    @property
    def spec(self) -> CodecSpec:
        """Codecs without a mean of their own take the session's."""
        return CodecSpec(
            keys=self.codecs[0],
            values=self.codecs[1],
            sink_tokens=SINK_TOKENS,
            mean="session" if self.centred else "none",
            fit_tokens=BASIS_FIT_TOKENS_MIN,
        )

    def plan(self, seen: Seen) -> CodecPlan:
        """Means are those of the whole text, bases those of its first tokens."""
        spec, fit = self.spec, None
        if spec.needs_fit:
            end = SINK_TOKENS + (BASIS_FIT_TOKENS_MIN if self.own else seen.keys.shape[1])
            keys, values = (x[:, SINK_TOKENS:end] for x in (seen.keys, seen.values))
            fit = fit_session(spec, keys, values, SINK_TOKENS, self.projections)
        return plan_for(spec, self.shape, fit, self.projections)

    @property
    def exact_end(self) -> int:
        return SINK_TOKENS + BASIS_FIT_TOKENS_MIN if self.own else SINK_TOKENS

    def __call__(self, seen: Seen) -> CodedAttention:
        return CodedAttention(self.plan(seen), self.backend, level=self.level, exact_end=self.exact_end)

    def any_plan(self) -> CodecPlan:
        """Of random vectors: what is asked of it must not depend on them."""
        tokens = SINK_TOKENS + BASIS_FIT_TOKENS_MIN
        noise = torch.randn(self.shape.layers, tokens, self.shape.kv_heads, self.shape.head_dim)
        return self.plan(Seen(noise, noise))

    def bits(self) -> Bits:
        """Of the kinds that are coded, at full depth."""
        return describe(self.any_plan())[self.kinds]

    def bits_at(self, tokens: int) -> float:
        """Bits a number of a session of so many tokens: with exact ones, its own means and bases; no projection."""
        plan, kinds = self.any_plan(), KINDS if self.kinds == "both" else (self.kinds,)
        numbers = len(kinds) * self.shape.layers * self.shape.kv_heads * self.shape.head_dim
        exact = min(tokens, self.exact_end)
        fit = 0 if plan.fit is None else sum(t.nbytes for n, t in plan.fit.tensors.items() if n.split("_")[1] in kinds)
        return (16 * exact * numbers + self.bits().total * (tokens - exact) * numbers + 8 * fit) / (tokens * numbers)


def _projection(text: str, codec: str, name: str | None, own: bool, known: Projections) -> Projection | None:
    if codec not in ("matryoshka", "projected") or (own and not name):
        return None
    if not known or (name and name not in known):
        raise ValueError(f"{text} needs a projection{f' called {name}' if name else ''}")
    return known[name] if name else next(iter(known.values()))


def _codec(name: str, amount: float, basis: str, head_dim: int) -> AnyCodec:
    match name:
        case "paper" | "qjl":
            return Qjl(bits=int(amount * head_dim), scale="paper" if name == "paper" else "ip")
        case "rotated":
            return Rotated(planes=int(amount))
        case "affine":
            return Affine(planes=int(amount))
        case "matryoshka":
            return Matryoshka(bits=amount, basis=basis)
    return Projected(share=amount, basis=basis)
