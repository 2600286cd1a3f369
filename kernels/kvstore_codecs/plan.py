"""A codec made concrete for one model shape and one fit: what each layer and kind stores, how it is made and read."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvstore_codecs.spec import DTYPE_BYTES, CodecSpec, Kind, ModelShape
from kvstore_kernels.types import Encoder, Expansion, SignLayout

FIT_TOKENS_MAX = 4096


class NotFittedError(ValueError):
    """The codec subtracts session means and no fit was given."""

    def __init__(self) -> None:
        super().__init__("NOT_FITTED: the codec's mean is 'session' and the session has no fit yet")


@dataclass(frozen=True, eq=False)
class Fit:
    """Statistics of a session: means of its own tokens [token_start, token_end), float32 [layers, H, D] each."""

    mean_keys: Tensor
    mean_values: Tensor
    token_start: int
    token_end: int

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

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the position range, the shape and the bytes."""
        text = f"{self.token_start} {self.token_end} {[*self.mean_keys.shape]}"
        return digest_of(text, (self.mean_keys, self.mean_values))

    def of(self, kind: Kind) -> Tensor:
        return self.mean_keys if kind == "keys" else self.mean_values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fit) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


@dataclass(frozen=True)
class SignPlan:
    """One layer and kind kept as signs. `levels[0]` is the finest; level i of a query is `levels[i]`."""

    layout: SignLayout
    encoder: Encoder
    levels: tuple[Expansion, ...]


@dataclass(frozen=True)
class DensePlan:
    """One layer and kind kept in the session's dtype."""


KindPlan = SignPlan | DensePlan


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
        plans = (*self.keys, *self.values)
        return sum(plan.layout.bytes_per_token if isinstance(plan, SignPlan) else dense for plan in plans)

    def of(self, layer: int, kind: Kind) -> KindPlan:
        return (self.keys if kind == "keys" else self.values)[layer]


def digest_of(text: str, tensors: Iterable[Tensor]) -> str:
    """sha256 over a text and the bytes of CPU tensors."""
    sha = hashlib.sha256(text.encode())
    for tensor in tensors:
        sha.update(tensor.contiguous().numpy().data)
    return sha.hexdigest()


def _mean(rows: Tensor) -> Tensor:
    """float32 [H, D] of [N, H, D]: halves added to halves, elementwise, so that no reduction chooses its own order."""
    count, total = rows.shape[0], rows.double()
    while len(total) > 1:
        half = len(total) // 2
        rest = total[2 * half :]
        total = torch.cat([total[:half] + total[half : 2 * half], rest])
    return (total[0] / count).float()
