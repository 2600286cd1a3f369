"""What the server says about sessions and about itself, as plain values."""

from dataclasses import dataclass
from functools import cached_property

from kvstore_client.errors import Internal
from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_proto.v1 import kvstore_pb2 as pb

DTYPES: "dict[str, pb.Dtype.ValueType]" = {
    "float32": pb.DTYPE_FLOAT32,
    "float16": pb.DTYPE_FLOAT16,
    "bfloat16": pb.DTYPE_BFLOAT16,
}
DTYPE_NAMES = {number: name for name, number in DTYPES.items()}


@dataclass(frozen=True)
class SessionInfo:
    """One session as it was when the server answered."""

    name: str
    generation: str
    length: int
    shape: ModelShape
    codec_json: str
    codec_fingerprint: str
    fitted: bool
    exact_end: int
    """Positions below are stored exactly."""
    fit_fingerprint: str
    """Names (codec, fit); empty before the fit."""
    ttl_seconds: float | None
    """None: never expires."""
    pinned: bool
    created_unix_seconds: float
    stored_bytes: int
    raw_bytes: int
    """What the same tokens take in the session's dtype."""
    forked_from: str | None
    forked_at: int | None
    affinity: str
    """What this session's calls carry in `x-kv-affinity`."""
    max_position: int | None = None
    """Positions beyond were not calibrated by the projections of the codec; None if it names none."""

    @cached_property
    def codec(self) -> CodecSpec:
        """ValueError for a codec that this version of the library does not know."""
        return CodecSpec.model_validate_json(self.codec_json)


@dataclass(frozen=True)
class ServerInfo:
    version: str
    device: str
    limits: dict[str, int]
    """Every bound of the server by its name."""
    codecs: tuple[str, ...]
    default_codec_json: str
    format_version: int
    store: str
    index: str

    def limit(self, name: str) -> int:
        """Internal if the server does not publish it."""
        if name not in self.limits:
            raise Internal(f"the server publishes no limit {name}")
        return self.limits[name]


@dataclass(frozen=True)
class PrefixMatch:
    """The longest stored prefix of a chain of token blocks, guaranteed readable until `valid_until_unix_seconds`."""

    session: str
    generation: str
    end: int
    valid_until_unix_seconds: float


@dataclass(frozen=True)
class ProjectionInfo:
    sha256: str
    size_bytes: int
    model_fingerprint: str
    header_json: str


def shape_to(shape: ModelShape) -> pb.ModelShape:
    group = pb.LayerGroup(
        count=shape.layers,
        kv_heads=shape.kv_heads,
        query_heads=shape.query_heads,
        k_dim=shape.head_dim,
        v_dim=shape.head_dim,
    )
    return pb.ModelShape(
        layer_groups=[group],
        dtype=DTYPES[shape.dtype],
        sm_scale=shape.sm_scale,
        logit_soft_cap=shape.logit_soft_cap,
        model_fingerprint=shape.model_fingerprint,
    )


def shape_from(message: pb.ModelShape) -> ModelShape:
    """Internal for a shape this library cannot hold: groups that differ, or K and V of different width."""
    groups = message.layer_groups
    widths = {(group.kv_heads, group.query_heads, group.k_dim, group.v_dim) for group in groups}
    if len(widths) != 1 or groups[0].k_dim != groups[0].v_dim:
        raise Internal(
            "the server sent a model shape whose layers differ; this version of the library needs equal ones"
        )
    return ModelShape.model_validate(
        {
            "layers": sum(group.count for group in groups),
            "kv_heads": groups[0].kv_heads,
            "query_heads": groups[0].query_heads,
            "head_dim": groups[0].k_dim,
            "dtype": DTYPE_NAMES.get(message.dtype),
            "sm_scale": message.sm_scale or groups[0].k_dim ** -0.5,
            "logit_soft_cap": message.logit_soft_cap,
            "model_fingerprint": message.model_fingerprint,
        }
    )


def session_from(message: pb.Session) -> SessionInfo:
    return SessionInfo(
        name=message.name,
        generation=message.generation,
        length=message.length,
        shape=shape_from(message.shape),
        codec_json=message.codec_json,
        codec_fingerprint=message.codec_fingerprint,
        fitted=message.fitted,
        exact_end=message.exact_end,
        fit_fingerprint=message.fit_fingerprint,
        ttl_seconds=message.ttl_seconds if message.HasField("ttl_seconds") else None,
        pinned=message.pinned,
        created_unix_seconds=message.created_unix_seconds,
        stored_bytes=message.stored_bytes,
        raw_bytes=message.raw_bytes,
        forked_from=message.forked_from if message.HasField("forked_from") else None,
        forked_at=message.forked_at if message.HasField("forked_at") else None,
        affinity=message.affinity,
        max_position=message.max_position if message.HasField("max_position") else None,
    )


def server_from(message: pb.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        version=message.version,
        device=message.device,
        limits=dict(message.limits),
        codecs=tuple(message.codecs),
        default_codec_json=message.default_codec_json,
        format_version=message.format_version,
        store=message.store,
        index=message.index,
    )
