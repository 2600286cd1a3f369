"""What a session is made of: its model shape and its codec. Frozen values, validated, with stable fingerprints."""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["keys", "values"]
KINDS: tuple[Kind, Kind] = ("keys", "values")
Seed = Annotated[int, Field(ge=0, lt=2**63)]
BASIS_FIT_TOKENS_MIN = 512
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Frozen(BaseModel, frozen=True):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelShape(Frozen, frozen=True):
    """The attention of one model: K and V have `head_dim` channels in every layer, RoPE is already applied to K."""

    layers: Annotated[int, Field(ge=1, le=1024)]
    kv_heads: Annotated[int, Field(ge=1, le=256)]
    query_heads: Annotated[int, Field(ge=1, le=1024)]
    head_dim: Annotated[int, Field(ge=32, le=256, multiple_of=32)]
    dtype: Literal["float32", "float16", "bfloat16"]
    sm_scale: Annotated[float, Field(gt=0)]
    logit_soft_cap: Annotated[float, Field(ge=0)] = 0.0
    """cap * tanh(logit / cap) before softmax; 0 means none."""
    model_fingerprint: Annotated[str, Field(max_length=256)] = ""
    """Model, revision and RoPE settings, as the worker names them; compared, never interpreted."""

    @model_validator(mode="after")
    def _whole_groups(self) -> "ModelShape":
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads {self.query_heads} is not a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def raw_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        return digest_of(self)


class Raw(Frozen, frozen=True):
    """The session's dtype, bit for bit."""

    name: Literal["raw"] = "raw"


class Qjl(Frozen, frozen=True):
    """Signs of a block-orthogonal projection (QJL, arXiv 2406.03482): `bits` rows a head.

    `scale` `ip` keeps <k, k^> exact and is unbiased; `paper` is sqrt(pi/2)/m |k|. Channels in `outlier_channels` get
    a second, disjoint sketch of `outlier_bits` rows and their own scale.
    """

    name: Literal["qjl"] = "qjl"
    bits: Annotated[int, Field(ge=32, le=4096, multiple_of=32)] = 256
    scale: Literal["ip", "paper"] = "ip"
    basis: Literal["haar", "hadamard"] = "haar"
    seed: Seed = 0
    outlier_channels: Annotated[tuple[Annotated[int, Field(ge=0, lt=256)], ...], Field(max_length=128)] = ()
    outlier_bits: Annotated[int, Field(ge=32, le=4096, multiple_of=32)] = 64

    @model_validator(mode="after")
    def _distinct(self) -> "Qjl":
        if list(self.outlier_channels) != sorted(set(self.outlier_channels)):
            raise ValueError("outlier_channels must be sorted and distinct")
        return self


class Rotated(Frozen, frozen=True):
    """A data-oblivious rotation, then `planes` bits a coordinate with one inner-product-preserving scale a token."""

    name: Literal["rotated"] = "rotated"
    planes: Annotated[int, Field(ge=1, le=6)] = 4
    basis: Literal["haar", "hadamard"] = "hadamard"
    seed: Seed = 0


class Affine(Frozen, frozen=True):
    """Min/max of groups of 32 channels a token (QJL's and KIVI's value quantiser), `planes` bits."""

    name: Literal["affine"] = "affine"
    planes: Annotated[int, Field(ge=1, le=8)] = 2


BasisSource = Annotated[str, Field(pattern=r"^(session|(session|projection):[0-9a-f]{64})$")]
"""`session`: fitted on the session's own first tokens. `projection:<sha256>`: that artifact's. `session:<sha256>`: the
session's own, in the metric and with the budgets of that artifact."""


class Matryoshka(Frozen, frozen=True):
    """A fitted basis with sign planes where they are worth most, in order of their worth (arXiv 2410.14731).

    `bits` a number on average over all layers, heads and kinds that have this very codec.
    """

    name: Literal["matryoshka"] = "matryoshka"
    bits: Annotated[float, Field(gt=0, le=6)] = 2.0
    basis: BasisSource = "session"


class Projected(Frozen, frozen=True):
    """The first coordinates in a fitted basis, in 16 bit: MatryoshkaKV as published.

    `share` of all coordinates on average over all layers, heads and kinds that have this very codec.
    """

    name: Literal["projected"] = "projected"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    basis: BasisSource = "session"


AnyCodec = Raw | Qjl | Rotated | Affine | Matryoshka | Projected
Fitted = Matryoshka | Projected
KindCodec = Annotated[AnyCodec, Field(discriminator="name")]


def projection_named(codec: AnyCodec) -> str:
    """The sha256 of the artifact that a codec's basis names, or an empty string."""
    return codec.basis.partition(":")[2] if isinstance(codec, Fitted) else ""


def _source(codec: AnyCodec) -> str:
    return codec.basis.partition(":")[0] if isinstance(codec, Fitted) else ""


class LayerOverride(Frozen, frozen=True):
    """Another codec for some layers. Negative layers count from the end; what is None stays as the session's."""

    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024)]
    keys: KindCodec | None = None
    values: KindCodec | None = None


class CodecSpec(Frozen, frozen=True):
    """How a session's vectors become what is stored."""

    keys: KindCodec
    values: KindCodec
    overrides: Annotated[tuple[LayerOverride, ...], Field(max_length=64)] = ()
    """Later overrides win."""
    sink_tokens: Annotated[int, Field(ge=0, le=256)] = 4
    """The first positions, kept exactly: they carry outlier norms."""
    mean: Literal["none", "session"] = "session"
    """`session` subtracts the mean vector of the session's own first tokens, per layer, KV head and kind."""
    fit_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
    """Non-sink tokens that must be there before means are computed; until then tokens stay exact."""

    @model_validator(mode="after")
    def _enough_to_fit(self) -> "CodecSpec":
        if any(_source(codec) == "session" for _, codec in self.codecs()):
            if self.mean != "session":
                raise ValueError("mean must be 'session' with a session basis")
            if self.fit_tokens < BASIS_FIT_TOKENS_MIN:
                raise ValueError(f"fit_tokens must be at least {BASIS_FIT_TOKENS_MIN} with a session basis")
        return self

    def of_layers(self, kind: Kind, layers: int) -> list[AnyCodec]:
        """The codec of every layer of a model of `layers` layers, which the overrides must be within."""
        chosen = [self.keys if kind == "keys" else self.values] * layers
        for override in self.overrides:
            codec = override.keys if kind == "keys" else override.values
            if codec is not None:
                for layer in override.layers:
                    chosen[layer] = codec
        return chosen

    def for_layer(self, layer: int, kind: Kind, layers: int) -> AnyCodec:
        """The codec of one layer and kind in a model of `layers` layers."""
        return self.of_layers(kind, layers)[layer]

    def codecs(self) -> Iterator[tuple[str, AnyCodec]]:
        """Every codec named in the spec, with the path of its field."""
        for path, chosen in (("", self), *((f"overrides[{i}].", o) for i, o in enumerate(self.overrides))):
            for kind in KINDS:
                codec = getattr(chosen, kind)
                if codec is not None:
                    yield path + kind, codec

    def session_layers(self, kind: Kind, layers: int) -> list[int]:
        """The layers of this kind whose basis the session's fit holds, in its order."""
        return [layer for layer, codec in enumerate(self.of_layers(kind, layers)) if _source(codec) == "session"]

    @property
    def projections(self) -> list[str]:
        """sha256 of every artifact that the codecs name, sorted."""
        return sorted({projection_named(codec) for _, codec in self.codecs()} - {""})

    @property
    def needs_fit(self) -> bool:
        return self.mean == "session" and any(codec.name != "raw" for _, codec in self.codecs())

    @property
    def fingerprint(self) -> str:
        return digest_of(self)


RAW = CodecSpec(keys=Raw(), values=Raw(), sink_tokens=0, mean="none")
"""Everything bit for bit."""

DEFAULT = CodecSpec(
    keys=Rotated(planes=4),
    values=Rotated(planes=4),
)
"""Calibration-free, about 0.27 of fp16."""


def digest_of(value: BaseModel) -> str:
    """sha256 over the canonical JSON of a frozen value: equal values have equal digests on every machine."""
    text = json.dumps(value.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
