"""A codec made concrete for one model shape and one fit: what each layer and kind stores and how it is made and read."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kvstore_codecs.spec import CodecSpec, Kind, ModelShape
from kvstore_kernels.types import Encoder, Expansion, SignLayout


@dataclass(frozen=True)
class Fit:
    """The session statistics of one epoch: means over its own non-sink tokens, float32 [layers, H, D] each."""

    mean_keys: Tensor
    mean_values: Tensor
    token_start: int
    token_end: int

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the bytes."""
        raise NotImplementedError


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
    """All layers of one codec, shape and fit."""

    spec: CodecSpec
    shape: ModelShape
    fit: Fit | None
    keys: tuple[KindPlan, ...]
    values: tuple[KindPlan, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the spec, the basis bytes and the fit: equal fingerprints store equal bytes for equal input."""
        raise NotImplementedError

    def of(self, layer: int, kind: Kind) -> KindPlan:
        return (self.keys if kind == "keys" else self.values)[layer]
