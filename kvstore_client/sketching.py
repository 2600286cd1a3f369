"""Encoding before sending: the wire then carries sketches, a quarter of the bytes or less.

Imported by those who encode only: the codecs' compiled operations take a moment to load.
"""

import asyncio
import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kvstore_client.errors import InvalidArgument, invalid
from kvstore_client.fetching import fetch_projection, fetch_sketches
from kvstore_client.frames import Block, part_frames
from kvstore_client.info import SessionInfo
from kvstore_client.link import Link
from kvstore_client.wire import Frame
from kvstore_codecs.artifact import read_projection
from kvstore_codecs.fit import fit_is_due
from kvstore_codecs.plan import CodecPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.sketch import KindRows, encode_kind
from kvstore_codecs.spec import KINDS, Kind
from kvstore_kernels.backend import Backend, cpu_backend, open_backend
from kvstore_kernels.types import NonFiniteError, ScaleRangeError
from kvstore_proto.v1 import kvstore_pb2 as pb

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sketcher:
    """A session's codec with its fit."""

    plan: CodecPlan
    exact_end: int

    def begins_epoch(self, start: int, tokens: int) -> bool:
        """Whether the server makes a new fit of vectors [start, start + tokens)."""
        return fit_is_due(self.plan.spec, self.plan.shape.layers, self.plan.fit, start, tokens)

    def encode(self, block: Block, start: int) -> list[Frame]:
        """Frames of the block whose first token is position `start`. InvalidArgument for NaN, Inf or a huge scale."""
        exact = max(0, min(block.tokens, self.exact_end - start))
        frames: list[Frame] = []
        for layer in range(len(block.keys)):
            for kind in KINDS:
                x = block.of(layer, kind)
                try:
                    rows = encode_kind(x, self.plan.of(layer, kind), exact, _backend_of(x.device))
                except (NonFiniteError, ScaleRangeError) as error:
                    raise _refused(kind, layer, error) from None
                frames += _frames(layer, kind, rows, exact)
        return frames


async def sketcher_for(link: Link, info: SessionInfo, timeout: float) -> Sketcher | None:
    """None if sketches would be no smaller or, with a warning, if this machine arrives at another plan."""
    fit = None
    if info.codec.needs_fit:
        fit = (await fetch_sketches(link, info, layers=(), start=0, end=0, timeout=timeout)).fit
    files = [(sha256, await fetch_projection(link, sha256, timeout)) for sha256 in info.codec.projections]
    projections = tuple([await asyncio.to_thread(read_projection, data, sha256) for sha256, data in files])
    plan = await asyncio.to_thread(plan_for, info.codec, info.shape, fit, projections)
    if plan.fingerprint != info.fit_fingerprint:
        LOG.warning("session %s: this machine's codec differs from the server's; appends go unencoded", info.name)
        return None
    if plan.bytes_per_token >= info.shape.raw_bytes_per_token:
        return None
    return Sketcher(plan, info.exact_end)


@cache
def _backend_of(device: torch.device) -> Backend:
    """Where the vectors are, there they are encoded."""
    return open_backend(f"cuda:{device.index or 0}") if device.type == "cuda" else cpu_backend()


def _frames(layer: int, kind: Kind, rows: KindRows, exact: int) -> list[Frame]:
    parts: list[tuple[pb.Part.ValueType, Tensor, int]] = [(pb.PART_ROWS, rows.rows.cpu(), 0)]
    if rows.signs is not None:
        parts += [(pb.PART_WORDS, rows.signs.words, exact), (pb.PART_SCALES, rows.signs.scales, exact)]
    return [frame for part, tensor, offset in parts for frame in part_frames(layer, kind, part, tensor, offset)]


def _refused(kind: Kind, layer: int, error: NonFiniteError | ScaleRangeError) -> InvalidArgument:
    return invalid("k" if kind == "keys" else "v", f"layer {layer}: {error}", layer=layer, token=error.token)
