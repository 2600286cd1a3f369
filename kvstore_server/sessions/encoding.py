"""From the vectors of one append to what is stored, making the session's fit on the way when it is due."""

import torch
from torch import Tensor

from kvstore_codecs.artifact import Projection
from kvstore_codecs.fit import fit_layer
from kvstore_codecs.plan import FIT_TOKENS_MAX, CodecPlan, DensePlan, Fit
from kvstore_codecs.sketch import KindRows, check_kind, encode_kind
from kvstore_codecs.spec import KINDS, CodecSpec, Kind, ModelShape
from kvstore_kernels import Backend, NonFiniteError, ScaleRangeError
from kvstore_server.errors import InvalidArgument
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.sessions.assembly import AppendAssembly


def make_layer_fit(
    spec: CodecSpec,
    resident: ResidentSession,
    assembly: AppendAssembly,
    first: int,
    start: int,
    layer: int,
    projections: tuple[Projection, ...],
) -> Fit:
    """One layer of a fit to the tokens from `first` on: those before `start`, all exact, and those of this append."""

    def rows(kind: Kind) -> Tensor:
        skipped = max(0, first - start)
        arriving = assembly.vectors(layer, kind)[skipped : skipped + FIT_TOKENS_MAX]
        if first >= start:
            return arriving
        return torch.cat([resident.exact_rows(layer, kind, first, start), arriving])[:FIT_TOKENS_MAX]

    try:
        return fit_layer(spec, resident.shape.layers, layer, {kind: rows(kind) for kind in KINDS}, first, projections)
    except ValueError as error:
        raise InvalidArgument("frame.data", str(error)) from None


def encode_layer(
    assembly: AppendAssembly, plan: CodecPlan | None, layer: int, kind: Kind, exact: int, backend: Backend
) -> KindRows:
    """What is stored of one layer and kind; InvalidArgument naming the first value that cannot be."""
    chosen = DensePlan() if plan is None else plan.of(layer, kind)
    try:
        return encode_kind(assembly.vectors(layer, kind), chosen, exact, backend)
    except (NonFiniteError, ScaleRangeError) as error:
        raise InvalidArgument(
            "frame.data", f"layer {layer} {kind}: {error}", layer=layer, kind=kind, token=error.token, head=error.head
        ) from None


def accept_sketch(
    assembly: AppendAssembly, plan: CodecPlan, shape: ModelShape, layer: int, kind: Kind, tokens: int, exact: int
) -> KindRows:
    """A layer and kind that the client encoded, once it is known to be one that this codec could have made."""
    rows = assembly.sketches(layer, kind)
    try:
        check_kind(rows, plan.of(layer, kind), shape, tokens, exact)
    except ValueError as error:
        raise InvalidArgument("frame.data", f"layer {layer} {kind}: {error}", layer=layer, kind=kind) from None
    return rows
