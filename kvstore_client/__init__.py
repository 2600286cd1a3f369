"""Client of the remote KV store: append attention keys and values once, attend to them from many workers."""

from kvstore_client.access import Tls
from kvstore_client.answers import Attention, Fidelity, Precision, Scores, Sketches, TopK
from kvstore_client.buffer import AppendBuffer
from kvstore_client.client import AsyncKVStoreClient
from kvstore_client.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    KVStoreError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
)
from kvstore_client.info import PrefixMatch, ProjectionInfo, ServerInfo, SessionInfo
from kvstore_client.merge import from_flashinfer, merge, to_flashinfer, to_sglang, to_vllm
from kvstore_client.prefix import Prefix
from kvstore_client.retry import NO_RETRY, Retry
from kvstore_client.session import Session
from kvstore_client.sync import KVStoreClient, SyncPrefix, SyncSession
from kvstore_client.token_chain import TokenChain
from kvstore_client.transport import ChannelOptions, GrpcTransport, Transport
from kvstore_codecs.spec import CodecSpec, LayerOverride, ModelShape

__all__ = [
    "NO_RETRY",
    "Aborted",
    "AlreadyExists",
    "AppendBuffer",
    "AsyncKVStoreClient",
    "Attention",
    "Cancelled",
    "ChannelOptions",
    "CodecSpec",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Fidelity",
    "GrpcTransport",
    "Internal",
    "InvalidArgument",
    "KVStoreClient",
    "KVStoreError",
    "LayerOverride",
    "ModelShape",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Precision",
    "Prefix",
    "PrefixMatch",
    "ProjectionInfo",
    "ResourceExhausted",
    "Retry",
    "Scores",
    "ServerInfo",
    "Session",
    "SessionInfo",
    "Sketches",
    "SyncPrefix",
    "SyncSession",
    "Tls",
    "TokenChain",
    "TopK",
    "Transport",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "from_flashinfer",
    "merge",
    "to_flashinfer",
    "to_sglang",
    "to_vllm",
]
