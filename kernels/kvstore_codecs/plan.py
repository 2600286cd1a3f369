"""A codec made concrete for one model shape and one fit: what each layer and kind stores, how it is made and read."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvstore_codecs.spec import DTYPE_BYTES, KINDS, CodecSpec, Kind, ModelShape
from kvstore_codecs.transform import Basis
from kvstore_kernels.types import Encoder, Expansion, SignEncoder, SignLayout

FIT_TOKENS_MAX = 4096
MEAN_CHANNELS = 64
"""Summed at a time: their rows then fit a core's cache."""
DEBIAS = 0.5
"""Of codecs whose bits do not follow what a score's error costs: half is best, measured."""


class NotFittedError(ValueError):
    """The codec subtracts session means and no fit was given."""

    def __init__(self) -> None:
        super().__init__("NOT_FITTED: the codec's mean is 'session' and the session has no fit yet")


@dataclass(frozen=True, eq=False)
class Fit:
    """Statistics of a session's own tokens [token_start, token_end): means, float32 [layers, H, D] each, and bases.

    A basis holds the layers whose codec has a session basis, in order; None where there is no such layer.
    """

    mean_keys: Tensor
    mean_values: Tensor
    token_start: int
    token_end: int
    basis_keys: Basis | None = None
    basis_values: Basis | None = None

    @classmethod
    def from_rows(cls, keys: Tensor, values: Tensor, token_start: int) -> "Fit":
        """Means of keys and values [layers, N, H, D] of the positions from `token_start`, over at most 4,096 of them.

        The sum is in float64 and in one order, so that equal rows give equal bytes on every machine. ValueError if the
        shapes differ, no token is given, or a mean is not finite.
        """
        if keys.shape != values.shape or keys.dim() != 4 or keys.shape[1] == 0:
            shapes = f"{[*keys.shape]} and {[*values.shape]}"
            raise ValueError(f"a fit needs keys and values [layers, N > 0, H, D], not {shapes}")
        used = min(keys.shape[1], FIT_TOKENS_MAX)
        means = [torch.stack([_mean(layer[:used]) for layer in rows]) for rows in (keys, values)]
        if not all(mean.isfinite().all() for mean in means):
            raise ValueError("the rows of a fit hold NaN or Inf")
        return cls(means[0], means[1], token_start, token_start + used)

    @classmethod
    def of_layers(cls, fits: "Sequence[Fit]") -> "Fit":
        """The fit whose layers these are, in order, all of the same tokens."""
        tensors: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for fit in fits for name in fit.tensors):
            tensors[name] = torch.cat([fit.tensors[name] for fit in fits if name in fit.tensors])
        return cls.from_tensors(tensors, fits[0].token_start, fits[0].token_end)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], token_start: int, token_end: int) -> "Fit":
        """The fit whose `tensors` these are."""
        bases = [
            Basis(tensors[f"basis_{kind}"], tensors[f"weights_{kind}"]) if f"basis_{kind}" in tensors else None
            for kind in KINDS
        ]
        return cls(tensors["mean_keys"], tensors["mean_values"], token_start, token_end, *bases)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the position range, the shape and the bytes."""
        tensors = self.tensors
        text = f"{self.token_start} {self.token_end} {[*self.mean_keys.shape]}"
        text += "".join(f" {name} {[*tensors[name].shape]}" for name in list(tensors)[2:])
        return digest_of(text, tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, means first, in the order in which they are stored."""
        found = {f"mean_{kind}": self.of(kind) for kind in KINDS}
        for kind in KINDS:
            if (basis := self.basis_of(kind)) is not None:
                found |= {f"basis_{kind}": basis.matrix, f"weights_{kind}": basis.weights}
        return found

    def basis_of(self, kind: Kind) -> Basis | None:
        return self.basis_keys if kind == "keys" else self.basis_values

    def of(self, kind: Kind) -> Tensor:
        return self.mean_keys if kind == "keys" else self.mean_values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fit) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


class Widths(NamedTuple):
    """What one token of a layer and kind that is not kept as it is takes: uint32 words and fp16 scales."""

    words: int
    scales: int

    @property
    def bytes_per_token(self) -> int:
        return 4 * self.words + 2 * self.scales


@dataclass(frozen=True)
class SignPlan:
    """One layer and kind kept as signs. `levels[0]` is the finest; level i of a query is `levels[i]`.

    `debias` is the share of half each key's score variance that attention subtracts, unless the query says otherwise.
    """

    layout: SignLayout
    encoder: Encoder
    levels: tuple[Expansion, ...]
    debias: float = 0.0

    @property
    def widths(self) -> Widths:
        return Widths(self.layout.words, self.layout.scales)


@dataclass(frozen=True)
class ProjectedPlan:
    """One layer and kind kept as leading coordinates in a basis, fp16, head by head, where signs have their scales.

    Head h keeps z = forward[h] (x - mean[h]), r_h of D coordinates, and is read as mean[h] + z inverse[h]; both are
    [r_h, D] float32, `mean` is [H, D].
    """

    forward: tuple[Tensor, ...]
    inverse: tuple[Tensor, ...]
    mean: Tensor

    @property
    def widths(self) -> Widths:
        return Widths(0, sum(len(rows) for rows in self.forward))


@dataclass(frozen=True)
class DensePlan:
    """One layer and kind kept in the session's dtype."""

    widths: None = None


KindPlan = SignPlan | ProjectedPlan | DensePlan


@dataclass(frozen=True)
class CodecPlan:
    """All layers of one codec, shape and fit. `basis_fingerprint` is the sha256 of every basis and its weights."""

    spec: CodecSpec
    shape: ModelShape
    fit: Fit | None
    keys: tuple[KindPlan, ...]
    values: tuple[KindPlan, ...]
    basis_fingerprint: str

    @cached_property
    def fingerprint(self) -> str:
        """Hash of spec, shape, basis bytes and fit: equal fingerprints store equal bytes for equal input."""
        fit = "" if self.fit is None else self.fit.fingerprint
        parts = (self.spec.fingerprint, self.shape.fingerprint, self.basis_fingerprint, fit)
        return digest_of("\n".join(parts), ())

    @cached_property
    def bytes_per_token(self) -> int:
        """Stored bytes of one token that is not exact; an exact one takes `shape.raw_bytes_per_token`."""
        dense = self.shape.kv_heads * self.shape.head_dim * DTYPE_BYTES[self.shape.dtype]
        widths = [plan.widths for plan in (*self.keys, *self.values)]
        return sum(dense if each is None else each.bytes_per_token for each in widths)

    @cached_property
    def matrix_bytes(self) -> int:
        """Of encoders and of every level, what heads or layers share counted once."""
        tensors = {}
        for plan in (*self.keys, *self.values):
            if isinstance(plan, SignPlan):
                found = [matrix for level in plan.levels for matrix in level.matrix]
                if isinstance(plan.encoder, SignEncoder):
                    found += [head.projection for head in plan.encoder.heads]
            else:
                found = [*plan.forward, *plan.inverse] if isinstance(plan, ProjectedPlan) else []
            tensors |= {id(tensor): tensor.nbytes for tensor in found}
        return sum(tensors.values())

    @property
    def own_bytes(self) -> int:
        """`matrix_bytes` of a plan that its session shares with none, else 0."""
        own = self.fit is not None and any(self.fit.basis_of(kind) is not None for kind in KINDS)
        return self.matrix_bytes if own else 0

    def of(self, layer: int, kind: Kind) -> KindPlan:
        return (self.keys if kind == "keys" else self.values)[layer]


def digest_of(text: str, tensors: Iterable[Tensor]) -> str:
    """sha256 over a text and the bytes of CPU tensors."""
    sha = hashlib.sha256(text.encode())
    for tensor in tensors:
        sha.update(tensor.contiguous().numpy().data)
    return sha.hexdigest()


def _mean(rows: Tensor) -> Tensor:
    """float32 [H, D] of [N, H, D]."""
    wide = rows.float().flatten(1)  # halves to doubles at once is the slower way
    sums = torch.cat([_sum(part) for part in wide.split(MEAN_CHANNELS, 1)])
    return (sums / len(rows)).float().view(rows.shape[1:])


def _sum(rows: Tensor) -> Tensor:
    """float64 [C] of [N, C]: halves added to halves, elementwise, so that no reduction chooses its own order."""
    total = rows.double()
    while len(total) > 1:
        half = len(total) // 2
        sums = total[:half] + total[half : 2 * half]
        total = torch.cat([sums, total[2 * half :]]) if len(total) % 2 else sums
    return total[0]
