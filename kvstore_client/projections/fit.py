"""A projection in closed form: no training, one pass over a text."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.projections.attention import answering
from kvstore_client.projections.gather import Gatherer
from kvstore_codecs.artifact import Metric, ProjectionHeader, write_projection
from kvstore_codecs.fit import fit_basis
from kvstore_codecs.spec import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gather(model: "PreTrainedModel", texts: Sequence[Tensor], done: Callable[[int], None]) -> Gatherer:
    """Statistics over texts [1, T]; calls `done` with how many were read."""
    gatherer = Gatherer(shape_of(model))
    with answering(model, gatherer), torch.inference_mode():
        for index, ids in enumerate(texts):
            model(ids.to(model.device), use_cache=False, logits_to_keep=1)
            done(index + 1)
    return gatherer


def projection_of(
    model: "PreTrainedModel", gatherer: Gatherer, texts: Sequence[Tensor], metric: Metric, max_position: int
) -> bytes:
    """The artifact of these statistics. ValueError if the texts are shorter than the positions it is for.

    Keys and values after RoPE drift with their position, so a basis is for positions that it has seen.
    """
    length = min(ids.shape[1] for ids in texts)
    if length < max_position:
        raise ValueError(f"texts of {length} tokens cannot calibrate max_position {max_position}")
    shape = shape_of(model)
    parts: dict[str, Tensor] = {}
    for kind in KINDS:
        layers = [statistics.moments(kind) for statistics in gatherer.layers]
        metrics = [statistics.metric(kind, metric) for statistics in gatherer.layers]
        bases = [fit_basis(m.covariance, weight) for m, weight in zip(layers, metrics, strict=True)]
        parts[f"{kind}.basis"] = torch.cat([basis.matrix for basis in bases])
        parts[f"{kind}.weights"] = torch.cat([basis.weights for basis in bases])
        parts[f"{kind}.mean"] = torch.stack([moments.mean.float() for moments in layers])
        if metric == "output":
            parts[f"{kind}.metric"] = torch.stack([weight.float() for weight in metrics if weight is not None])
    header = ProjectionHeader(
        model_fingerprint=shape.model_fingerprint,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        metric=metric,
        max_position=max_position,
        calibration_tokens=sum(ids.shape[1] for ids in texts),
        calibration_length=length,
        data_sha256=hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in texts)).hexdigest(),
        has_metrics=metric == "output",
    )
    return write_projection(header, parts)
