"""How much of a full answer a coarse pass finds, and how many of the bytes that takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore_client.projections.attention import RECENT_TOKENS, SINK_TOKENS, LayerCall
from kvstore_client.projections.quality import exact_pass
from kvstore_client.projections.rows import CodecRow
from kvstore_codecs.plan import CodecPlan, SignPlan
from kvstore_kernels.types import DenseRows, Expansion, SignRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

K, OVERSAMPLINGS = 64, (2, 4, 8)
QUERIES = 8
"""The last ones of a text, one after the other."""


@dataclass(frozen=True)
class CoarseToFine:
    """Means over layers and queries: recall of the best 64 stored keys of each query head, against all bits and against
    the exact keys, and bytes read over those of all bits.
    """

    recall: float
    recall_exact: float
    bytes_read: float


def coarse_to_fine(
    model: "PreTrainedModel", ids: Tensor, rows: Mapping[str, CodecRow]
) -> dict[tuple[str, int], CoarseToFine]:
    """By row, of those that read a coarser level of keys, and oversampling; on one text [1, T] in the exact model."""
    calls: list[LayerCall] = []
    if not rows:
        return {}
    with torch.inference_mode():
        _, seen = exact_pass(model, ids.to(model.device), calls.append)
        plans = {name: row.plan(seen) for name, row in rows.items()}
        found = {name: torch.stack([_layer(call, row, plans[name]) for call in calls]) for name, row in rows.items()}
    return {
        (name, oversampling): CoarseToFine(*fields.tolist())
        for name, layers in found.items()
        for oversampling, fields in zip(OVERSAMPLINGS, layers.mean(0), strict=True)
    }


def _layer(call: LayerCall, row: CodecRow, plans: CodecPlan) -> Tensor:
    """The fields of a CoarseToFine, of one layer, for each oversampling."""
    plan, ops = plans.of(call.layer, "keys"), row.backend
    assert isinstance(plan, SignPlan)
    keys = call.k[:, SINK_TOKENS : -RECENT_TOKENS - QUERIES].transpose(0, 1).cpu().contiguous()
    q = call.q[:, -QUERIES:].transpose(0, 1).cpu().contiguous()
    signs, coarse, fine = ops.encode(keys, plan.encoder), plan.levels[row.level], plan.levels[0]
    scale = {"sm_scale": call.sm_scale}
    best = [
        ops.topk(logits, K)[0].unsqueeze(2)
        for logits in (ops.score(q, SignRows(signs, fine), **scale), ops.score(q, DenseRows(keys), **scale))
    ]
    ranked, _ = ops.topk(ops.score(q, SignRows(signs, coarse), **scale), K * max(OVERSAMPLINGS))
    found = []
    for candidates in (ranked[:, :, : K * oversampling] for oversampling in OVERSAMPLINGS):
        order, _ = ops.topk(ops.score_at(q, SignRows(signs, fine), candidates, **scale), K)
        chosen = candidates.gather(2, order).unsqueeze(3)
        recalls = [(chosen == wanted).any(3).double().mean() for wanted in best]
        read = len(keys) * _bytes(coarse) + _bytes_again(candidates, fine)
        found.append(torch.stack([*recalls, torch.tensor(read / (len(keys) * _bytes(fine)), dtype=torch.float64)]))
    return torch.stack(found)


def _bytes(level: Expansion) -> int:
    """Of one token's words and scales, of all heads that read any."""
    return sum(4 * words + 2 * (words > 0) for words in map(level.read_words, range(level.layout.heads)))


def _bytes_again(candidates: Tensor, fine: Expansion) -> float:
    """Of the candidates of each KV head, mean over query tokens: those of several query heads are read once."""
    total = 0
    for head, asked in enumerate(candidates.unflatten(1, (fine.layout.heads, -1)).unbind(1)):
        rows = sum(len(each.unique()) for each in asked)
        total += rows * (4 * fine.read_words(head) + 2)
    return total / len(candidates)
