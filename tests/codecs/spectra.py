"""Vectors with a steep spectrum, and projections fitted to them."""

from functools import lru_cache

import torch
from torch import Tensor

from kvstore_codecs.artifact import Metric, Projection, ProjectionHeader, read_projection, write_projection
from kvstore_codecs.fit import Moments, fit_basis
from kvstore_codecs.plan import CodecPlan, KindPlan, SignPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import KINDS, CodecSpec, Matryoshka, Projected, Raw
from tests.codecs.inputs import seeded, shape_of

LAYERS, HEADS = 2, 3
TOKENS = 2000


@lru_cache(maxsize=8)
def vectors(d: int, seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """[kinds, layers, tokens, heads, d]: mean 3, mean squares from 1 down to 1e-4, and later heads ten times larger."""
    generator = seeded(seed)
    turns = torch.linalg.qr(torch.randn(2, LAYERS, HEADS, d, d, generator=seeded(99))).Q
    sizes = torch.logspace(0, -2, d) * torch.tensor([1.0, 3.0, 10.0])[:, None]
    z = torch.randn(2, LAYERS, tokens, HEADS, d, generator=generator) * sizes
    return 3 + torch.einsum("klhde,klnhe->klnhd", turns, z)


@lru_cache(maxsize=8)
def metrics(d: int) -> Tensor:
    """Positive definite [kinds, layers, heads, d, d]."""
    a = torch.randn(2, LAYERS, HEADS, d, d, generator=seeded(7))
    return a @ a.transpose(-1, -2) / d + 0.05 * torch.eye(d)


@lru_cache(maxsize=8)
def projection(d: int, metric: Metric = "output", words: tuple[tuple[float, tuple[int, ...]], ...] = ()) -> Projection:
    """Fitted to `vectors(d)`; `words` are budgets with the words of every head."""
    parts: dict[str, Tensor] = {}
    for index, kind in enumerate(KINDS):
        bases, means = [], []
        for layer in range(LAYERS):
            moments = Moments(HEADS, d)
            moments.add(vectors(d)[index, layer])
            bases.append(fit_basis(moments.covariance, metrics(d)[index, layer] if metric == "output" else None))
            means.append(moments.mean.float())
        parts[f"{kind}.basis"] = torch.cat([basis.matrix for basis in bases])
        parts[f"{kind}.weights"] = torch.cat([basis.weights for basis in bases])
        parts[f"{kind}.mean"] = torch.stack(means)
        if metric == "output":
            parts[f"{kind}.metric"] = metrics(d)[index]
    for bits, own in words:
        parts[f"words.{bits:g}"] = torch.tensor(own, dtype=torch.int32).view(2, LAYERS, HEADS)
    header = ProjectionHeader(
        model_fingerprint="",
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=d,
        metric=metric,
        max_position=TOKENS,
        calibration_tokens=TOKENS,
        calibration_length=TOKENS,
        has_metrics=metric == "output",
        budgets=tuple(bits for bits, _ in words),
    )
    return read_projection(write_projection(header, parts))


def fitted_plan(codec: Matryoshka | Projected, d: int, *projections: Projection, both: bool = True) -> CodecPlan:
    """The codec for keys and, with `both`, values, with the means of its projection."""
    spec = CodecSpec(keys=codec, values=codec if both else Raw(), mean="none")
    return plan_for(spec, shape_of(d, layers=LAYERS, kv_heads=HEADS), None, projections)


def matryoshka(d: int, bits: float, metric: Metric = "output", *, both: bool = True) -> CodecPlan:
    found = projection(d, metric)
    return fitted_plan(Matryoshka(bits=bits, basis=f"projection:{found.sha256}"), d, found, both=both)


def as_signs(plan: KindPlan) -> SignPlan:
    assert isinstance(plan, SignPlan)
    return plan
