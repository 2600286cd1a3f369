"""Bases made from vectors: covariances, and the eigenvectors that order their directions, in float64.

What is fitted is kept as bytes and never fitted again, so that eigenvectors, which differ between machines and
libraries, differ nowhere else.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvstore_codecs.artifact import Projection
from kvstore_codecs.plan import Fit
from kvstore_codecs.spec import KINDS, CodecSpec, Fitted, Kind
from kvstore_codecs.transform import Basis

BLOCK_TOKENS = 256
WEIGHT_MIN = 1e-6
"""Of the head's largest: directions in which nothing was seen."""
CONSTANT_MAX = 1e-12
"""Vectors that vary less than this, where 1 is usual, are all the same: later ones are then coded as if 1 was."""
METRIC_MIN = 1e-4
"""Of the head's mean: a metric from few rows says nothing of some directions, which is not that they cost nothing."""


class Moments:
    """Sums over vectors [N, H, D] that come in pieces: mean and covariance of each head."""

    def __init__(self, heads: int, d: int) -> None:
        self.count = 0
        self._sum = torch.zeros(heads, d, dtype=torch.float64)
        self._squares = torch.zeros(heads, d, d, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """In blocks of 256 from the first, so that equal pieces give equal sums whatever the threads do."""
        for block in x.double().split(BLOCK_TOKENS):
            by_head = block.transpose(0, 1)
            self._sum += by_head.sum(1)
            self._squares += by_head.transpose(1, 2) @ by_head
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """float64 [H, D]."""
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 [H, D, D]."""
        return self._squares / self.count - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    @property
    def second(self) -> Tensor:
        """float64 [H, D, D]: the covariance about zero."""
        return self._squares / self.count


def fit_basis(covariance: Tensor, metric: Tensor | None = None) -> Basis:
    """Bases float32 [1, H, D, D] of vectors with these covariances [H, D, D], best direction first.

    Without a metric the principal directions; with M [H, D, D] those of M^1/2 C M^1/2, so that weights are what losing
    a coordinate costs in the metric (docs/codecs.md).
    """
    half = None if metric is None else _root(metric.double())
    inner = covariance.double() if half is None else half @ covariance.double() @ half
    values, vectors = torch.linalg.eigh((inner + inner.transpose(1, 2)) / 2)
    values, vectors = values.flip(1), vectors.flip(2)
    unit = torch.ones(len(values)) if metric is None else metric.double().diagonal(dim1=1, dim2=2).mean(1)
    largest = torch.where(values[:, :1] > CONSTANT_MAX * unit.unsqueeze(1), values[:, :1], unit.unsqueeze(1))
    weights = torch.maximum(values, WEIGHT_MIN * largest)
    matrix = vectors if half is None else half @ vectors
    return Basis(matrix.float().unsqueeze(0), weights.float().unsqueeze(0))


def fit_is_due(spec: CodecSpec, layers: int, newest: Fit | None, start: int, tokens: int) -> bool:
    """Whether an append of vectors [start, start + tokens) makes a fit.

    The first does that brings enough tokens beyond the sinks; where bases are the session's own, another that starts at
    twice the end of the newest fit's tokens or beyond, and brings at least half as many tokens as that is of.
    """
    if newest is None:
        return spec.needs_fit and start + tokens - spec.sink_tokens >= spec.fit_tokens
    enough = max(spec.fit_tokens, (newest.token_end - newest.token_start) // 2)
    due = start >= 2 * newest.token_end and tokens >= enough
    return due and any(spec.session_layers(kind, layers) for kind in KINDS)


def fit_layer(
    spec: CodecSpec,
    layers: int,
    layer: int,
    rows: dict[Kind, Tensor],
    token_start: int,
    projections: Sequence[Projection],
) -> Fit:
    """The part of a session's fit that is of one of its layers, whose first tokens from `token_start` on are `rows`.

    Each is [N, H, D]. Bases are kept in half precision, scaled by a power of two a head: a basis is as good after
    rounding, and its inverse is that of the rounded one. ValueError as Fit.from_rows.
    """
    fit = Fit.from_rows(rows["keys"].unsqueeze(0), rows["values"].unsqueeze(0), token_start)
    known = {projection.sha256: projection for projection in projections}
    bases: dict[Kind, Basis | None] = {}
    for kind, x in rows.items():
        codec, bases[kind] = spec.for_layer(layer, kind, layers), None
        if isinstance(codec, Fitted) and codec.basis.startswith("session"):
            moments = Moments(*x.shape[1:])
            moments.add(x[: fit.token_end - token_start].float() - fit.of(kind)[0])
            sha256 = codec.basis.partition(":")[2]
            metric = known[sha256].metric(kind) if sha256 else None
            bases[kind] = _halved(fit_basis(moments.covariance, None if metric is None else metric[layer]))
    return replace(fit, basis_keys=bases["keys"], basis_values=bases["values"])


def fit_session(
    spec: CodecSpec, keys: Tensor, values: Tensor, token_start: int, projections: Sequence[Projection]
) -> Fit:
    """Of a session's first tokens [layers, N, H, D] from `token_start` on."""
    layers: list[dict[Kind, Tensor]] = [{"keys": k, "values": v} for k, v in zip(keys, values, strict=True)]
    return Fit.of_layers(
        [fit_layer(spec, len(layers), layer, rows, token_start, projections) for layer, rows in enumerate(layers)]
    )


def _halved(basis: Basis) -> Basis:
    exponent = -basis.matrix.abs().amax((2, 3)).log2().ceil()
    scale = torch.exp2(exponent)
    return Basis((basis.matrix * scale[..., None, None]).half(), basis.weights * scale.square()[..., None])


def _root(metric: Tensor) -> Tensor:
    """The symmetric square root of [H, D, D]."""
    values, vectors = torch.linalg.eigh((metric + metric.transpose(1, 2)) / 2)
    floor = METRIC_MIN * values.mean(1, keepdim=True).clamp(min=1e-30)
    return (vectors * torch.maximum(values, floor).sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
