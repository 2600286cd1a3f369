"""Queries over the blocks of one layer: what runs on the device thread."""

from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from kvstore_codecs import projected
from kvstore_codecs.plan import SignPlan
from kvstore_codecs.spec import Kind
from kvstore_kernels import Backend, DenseRows, SignRows, merge_states
from kvstore_server.errors import FailedPrecondition
from kvstore_server.memory.resident import Block, ResidentSession
from kvstore_server.sessions.model import Fidelity, Precision


def full_heads(q: Tensor, head_offset: int, query_heads: int) -> Tensor:
    """q [T, heads, D] as [T, query_heads, D], zero where the caller has no heads."""
    if q.shape[1] == query_heads:
        return q
    whole = q.new_zeros((q.shape[0], query_heads, q.shape[2]))
    whole[:, head_offset : head_offset + q.shape[1]] = q
    return whole


def attend(
    backend: Backend, resident: ResidentSession, layer: int, end: int, q: Tensor, precision: Precision, debias: float
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and natural-log lse [T, Hq], float32, over positions [0, end) of `layer`."""
    shape = resident.shape
    states = [
        projected.attend(
            backend,
            q,
            block.keys,
            block.values,
            sm_scale=shape.sm_scale,
            logit_soft_cap=shape.logit_soft_cap,
            debias=debias,
        )
        for block in blocks(resident, layer, 0, end, precision)
    ]
    if not states:
        return torch.zeros(q.shape, dtype=torch.float32), torch.full(q.shape[:2], -torch.inf)
    return states[0] if len(states) == 1 else merge_states(states)


def score(
    backend: Backend, resident: ResidentSession, layer: int, start: int, end: int, q: Tensor, precision: Precision
) -> Tensor:
    """float32 logits [T, Hq, end - start] of positions [start, end)."""
    shape = resident.shape
    parts = [
        projected.score(backend, q, block.keys, sm_scale=shape.sm_scale, logit_soft_cap=shape.logit_soft_cap)
        for block in blocks(resident, layer, start, end, precision)
    ]
    return torch.cat(parts, dim=2) if parts else torch.empty((*q.shape[:2], 0))


def top_k(
    backend: Backend,
    resident: ResidentSession,
    layer: int,
    end: int,
    q: Tensor,
    k: int,
    precision: Precision,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Positions int64 and logits float32 [T, Hq, min(k, end)], best first, ties by lower position.

    `candidates` > 0: the best so many by `precision` are scored again at the finest level.
    """
    scores = score(backend, resident, layer, 0, end, q, precision)
    if not candidates:
        return backend.topk(scores, k)
    positions = backend.topk(scores, min(candidates, end))[0].sort(dim=2).values
    finest = score(backend, resident, layer, 0, end, q, replace(precision, keys_level=0)).gather(2, positions)
    order, best = backend.topk(finest, k)
    return positions.gather(2, order), best


def fidelity(
    backend: Backend, resident: ResidentSession, layer: int, end: int, q: Tensor, heads: slice, precision: Precision
) -> Fidelity:
    """What an answer at `precision` over [0, end) is worth; the levels are those really read."""
    variance, exact = 0.0, True
    for block in blocks(resident, layer, 0, end, precision):
        exact &= isinstance(block.keys, DenseRows) and isinstance(block.values, DenseRows)
        if isinstance(block.keys, SignRows):
            per_row = backend.score_variance(q, block.keys.expansion, block.keys.signs.scales)
            variance = float(per_row[:, heads].mean())
    plan = resident.plan
    return Fidelity(
        codec="raw" if plan is None else plan.spec.for_layer(layer, "keys", resident.shape.layers).name,
        codec_fingerprint="" if plan is None else plan.fingerprint,
        precision=Precision(
            min(precision.keys_level, _levels(resident, layer, "keys") - 1),
            min(precision.values_level, _levels(resident, layer, "values") - 1),
        ),
        score_stderr=resident.shape.sm_scale * sqrt(variance),
        exact=exact,
    )


def _levels(resident: ResidentSession, layer: int, kind: Kind) -> int:
    plan = resident.plan_of(layer, kind)
    return len(plan.levels) if isinstance(plan, SignPlan) else 1


def check_precision(resident: ResidentSession, layer: int, precision: Precision) -> None:
    """FailedPrecondition when `required` and the codec has no such level."""
    asked: dict[Kind, int] = {"keys": precision.keys_level, "values": precision.values_level}
    for kind, level in asked.items():
        if precision.required and level >= (levels := _levels(resident, layer, kind)):
            raise FailedPrecondition("NO_LEVEL", f"{kind} of layer {layer} have {levels} levels", limit=levels)


def debias_of(resident: ResidentSession, layer: int, asked: float | None) -> float:
    """The share asked for, or the codec's default."""
    if asked is not None:
        return asked
    plan = resident.plan_of(layer, "keys")
    return plan.debias if isinstance(plan, SignPlan) else 0.0


def blocks(resident: ResidentSession, layer: int, start: int, end: int, precision: Precision) -> list[Block]:
    """Positions [start, end) of `layer` as they are stored, read at `precision`."""
    levels: dict[Kind, int] = {"keys": precision.keys_level, "values": precision.values_level}
    return list(resident.blocks(layer, start, end, levels))
