"""`projected`: the first coordinates in a fitted basis, 16 bit each (MatryoshkaKV as published, arXiv 2410.14731).

The second kind of storage, dense(F, r). Coordinates are stored where sign codecs have their scales, so that objects,
frames and memory know nothing of it, and read by the dense op: of a query in the basis against coordinates padded with
zeros, as the published code does, what the mean adds to logits or to the output coming after.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvstore_codecs.plan import ProjectedPlan
from kvstore_codecs.transform import Basis, inverse_of
from kvstore_kernels.backend import Backend, State, Stored
from kvstore_kernels.types import DenseRows, NonFiniteError, Rows, ScaleRangeError, Signs

FP16_MAX = 65504.0


@dataclass(frozen=True)
class ProjectedRows:
    """Stored coordinates float16 [N, sum r_h] with the plan that reads them."""

    coordinates: Tensor
    plan: ProjectedPlan

    def padded(self) -> DenseRows:
        """[N, H, D]: the coordinates of each head, then zeros."""
        heads, d = self.plan.mean.shape
        out = torch.zeros(len(self.coordinates), heads, d, dtype=torch.float16, device=self.coordinates.device)
        for head, part in enumerate(self.coordinates.split([len(rows) for rows in self.plan.inverse], dim=1)):
            out[:, head, : part.shape[1]] = part
        return DenseRows(out)


StoredRows = Rows | ProjectedRows


def projected_plan(basis: Basis, layer: int, ranks: list[int], mean: Tensor) -> ProjectedPlan:
    """The first `ranks[h]` coordinates of each head of `basis` row `layer`."""
    forward = basis.matrix[layer].float().transpose(1, 2)
    inverse = torch.from_numpy(inverse_of(basis.matrix[layer]).astype(np.float32))
    keep = [slice(rank) for rank in ranks]
    return ProjectedPlan(
        tuple(rows[kept].contiguous() for rows, kept in zip(forward, keep, strict=True)),
        tuple(rows[kept].contiguous() for rows, kept in zip(inverse, keep, strict=True)),
        mean,
    )


def project(x: Tensor, plan: ProjectedPlan) -> Signs:
    """What is stored of x [N, H, D]: no words, and coordinates as scales.

    Raises NonFiniteError, or ScaleRangeError for a coordinate that fp16 does not hold.
    """
    _check(x.isfinite().all(2), NonFiniteError)
    centred = (x.float() - plan.mean).double()
    parts = [centred[:, head] @ rows.double().T for head, rows in enumerate(plan.forward)]
    _check(torch.stack([(part.abs() <= FP16_MAX).all(1) for part in parts], 1), ScaleRangeError)
    return Signs(torch.empty(len(x), 0, dtype=torch.int32), torch.cat(parts, 1).half())


def decode(backend: Backend, rows: StoredRows) -> Tensor:
    """Backend.decode of anything stored."""
    if not isinstance(rows, ProjectedRows):
        return backend.decode(rows)
    padded = rows.padded().data.double()
    parts = [padded[:, head, : len(matrix)] @ matrix.double() for head, matrix in enumerate(rows.plan.inverse)]
    return torch.stack(parts, 1).float() + rows.plan.mean


def score(backend: Backend, q: Tensor, keys: Stored, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
    """Backend.score of anything stored."""
    q, dense, shift = _seen_by(backend, q, keys, sm_scale, logit_soft_cap)
    scores = backend.score(q, dense, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)
    return scores if shift is None else scores + shift.unsqueeze(2).to(scores.device)


def best(
    backend: Backend, q: Tensor, keys: Stored, k: int, *, sm_scale: float, logit_soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Backend.best of anything stored."""
    how = {"sm_scale": sm_scale, "logit_soft_cap": logit_soft_cap}
    if isinstance(keys, ProjectedRows):
        return backend.topk(score(backend, q, keys, **how), k)
    return backend.best(q, keys, k, **how)


def attend(
    backend: Backend,
    q: Tensor,
    keys: Stored,
    values: Stored,
    *,
    sm_scale: float,
    logit_soft_cap: float = 0.0,
    debias: float = 0.0,
) -> State:
    """Backend.attend of anything stored, over at least one token."""
    if not isinstance(keys, ProjectedRows) and not isinstance(values, ProjectedRows):
        return backend.attend(q, keys, values, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap, debias=debias)
    q, dense, shift = _seen_by(backend, q, keys, sm_scale, logit_soft_cap)
    stored = values.padded() if isinstance(values, ProjectedRows) else values
    out, lse = backend.attend(q, dense, stored, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap, debias=debias)
    if isinstance(values, ProjectedRows):
        group = out.shape[1] // len(values.plan.inverse)
        out = torch.cat(
            [
                (rows[..., : len(matrix)].double() @ matrix.double().to(out.device) + mean.to(out.device)).float()
                for rows, matrix, mean in zip(
                    out.split(group, dim=1), values.plan.inverse, values.plan.mean, strict=True
                )
            ],
            dim=1,
        )
    return out, lse if shift is None else lse + shift.to(lse.device)


def _seen_by(
    backend: Backend, q: Tensor, keys: Stored, sm_scale: float, logit_soft_cap: float
) -> tuple[Tensor, Stored, Tensor | None]:
    """q, rows and what their logits lack [T, Hq]. A soft cap is no sum: vectors are rebuilt for it."""
    if not isinstance(keys, ProjectedRows):
        return q, keys, None
    if logit_soft_cap:
        return q, DenseRows(decode(backend, keys)), None
    by_head = q.double().split(q.shape[1] // len(keys.plan.inverse), dim=1)
    rotated = torch.zeros(q.shape)
    for rows, head, matrix in zip(rotated.split(by_head[0].shape[1], dim=1), by_head, keys.plan.inverse, strict=True):
        rows[..., : len(matrix)] = head @ matrix.double().T
    shift = torch.cat([rows @ mean.double() for rows, mean in zip(by_head, keys.plan.mean, strict=True)], dim=1)
    return rotated, keys.padded(), (shift * sm_scale).float()


def _check(good: Tensor, error: type[NonFiniteError | ScaleRangeError]) -> None:
    """Raises for the first token and head [N, H] that is not good."""
    if not good.all():
        token, head = (~good).nonzero()[0].tolist()
        raise error(token, head)
