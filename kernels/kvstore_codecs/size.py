"""What a session takes, computed from its codec and shape."""

import torch

from kvstore_codecs.fit import fit_session
from kvstore_codecs.plan import CodecPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import KINDS, CodecSpec, ModelShape

DEFAULT_CODECS = ("raw", "rotated:4", "rotated:3", "rotated:2", "qjl:256", "matryoshka:2", "projected:0.5")
PAGE_TOKENS, CRC_BYTES = 256, 4
"""A checksum for each layer, kind and page, in every object."""


def bytes_per_token(spec: CodecSpec, shape: ModelShape) -> int:
    """Stored bytes of one token that is not exact.

    A codec with a basis of the session's own shares its bits out by what the session's vectors are like; here all
    directions are alike. ValueError for one that names a projection, and for what does not fit the shape.
    """
    return _plan(spec, shape).bytes_per_token


def session_bytes(spec: CodecSpec, shape: ModelShape, tokens: int) -> int:
    """Of objects as large as they get, without their headers (2 KiB or so each) and the fit that one of them holds."""
    exact = min(tokens, spec.sink_tokens)
    pages = -(-tokens // PAGE_TOKENS) * shape.layers * len(KINDS)
    return exact * shape.raw_bytes_per_token + (tokens - exact) * bytes_per_token(spec, shape) + pages * CRC_BYTES


def _plan(spec: CodecSpec, shape: ModelShape) -> CodecPlan:
    if spec.projections:
        raise ValueError("the size of a codec with a projection depends on its file: see `kvstore projections show`")
    count = max(spec.fit_tokens, 2 * shape.head_dim) if any("basis" in vars(c) for _, c in spec.codecs()) else 1
    rows = torch.randn((2, 1, count, shape.kv_heads, shape.head_dim), generator=torch.Generator().manual_seed(0))
    keys, values = rows.expand(2, shape.layers, count, shape.kv_heads, shape.head_dim)
    return plan_for(spec, shape, fit_session(spec, keys, values, spec.sink_tokens, ()) if spec.needs_fit else None)
