"""Inputs of the codec tests: shapes, plans, isotropic pairs at known angles, and what codecs estimate for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvstore_codecs.plan import SignPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import Affine, CodecSpec, ModelShape, Qjl, Raw, Rotated
from kvstore_kernels.backend import cpu_backend
from kvstore_kernels.types import Expansion, SignRows
from kvstore_kernels.variance import alpha_columns, score_variance, sum_of_squares

RHOS = (0.0, 0.5, 0.9, 1.0)
DRAWS = 20_000
LAYERS = 8
"""Bases a simulation is spread over."""

SignCodec = Qjl | Rotated | Affine


def shape_of(
    head_dim: int, *, layers: int = 1, kv_heads: int = 1, group: int = 1, dtype: str = "float32"
) -> ModelShape:
    return ModelShape.model_validate(
        {
            "layers": layers,
            "kv_heads": kv_heads,
            "query_heads": kv_heads * group,
            "head_dim": head_dim,
            "dtype": dtype,
            "sm_scale": head_dim**-0.5,
        }
    )


def sign_plan(codec: SignCodec, head_dim: int, *, layer: int = 0, layers: int = 1, kv_heads: int = 1) -> SignPlan:
    """The plan of keys with that codec, without means."""
    spec = CodecSpec(keys=codec, values=Raw(), mean="none")
    plan = plan_for(spec, shape_of(head_dim, layers=layers, kv_heads=kv_heads), None).of(layer, "keys")
    assert isinstance(plan, SignPlan)
    return plan


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(count: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit q [count, d] and unit k [count, len(RHOS), d] with <q, k> = rho."""
    generator = seeded(seed)
    q = _unit(torch.randn(count, d, generator=generator))
    across = torch.randn(count, d, generator=generator)
    across = _unit(across - (across * q).sum(dim=1, keepdim=True) * q)
    return q, torch.stack([rho * q + math.sqrt(1 - rho * rho) * across for rho in RHOS], dim=1)


@dataclass(frozen=True)
class Estimates:
    """`values[level]` [draws, len(RHOS)] is <q, k^> of unit pairs, `predicted[level]` the variance a plan promises."""

    values: tuple[Tensor, ...]
    predicted: tuple[float, ...]

    def mean_errors_in_sd(self, level: int, expected: Sequence[float] = RHOS) -> list[float]:
        """(mean - expected) / (sd / sqrt(N)) by rho; below 1e-5, sd / sqrt(N) is rounding."""
        values = self.values[level]
        errors = values.mean(dim=0) - torch.tensor(expected, dtype=torch.float64)
        return (errors / (values.std(dim=0) / math.sqrt(len(values))).clamp(min=1e-5)).tolist()

    def variance(self, level: int) -> list[float]:
        return self.values[level].var(dim=0).tolist()


@lru_cache(maxsize=64)
def estimates(codec: SignCodec, head_dim: int, *, draws: int = DRAWS, seed: int = 2) -> Estimates:
    """What `codec` estimates for isotropic pairs, over LAYERS independent bases."""
    plans = [sign_plan(codec, head_dim, layer=layer, layers=LAYERS, kv_heads=len(RHOS)) for layer in range(LAYERS)]
    return simulate(plans, head_dim, draws=draws, seed=seed)


def simulate(plans: list[SignPlan], head_dim: int, *, draws: int = DRAWS, seed: int = 2) -> Estimates:
    backend, found, predicted = cpu_backend(), [], []
    for index, plan in enumerate(plans):
        q, k = pairs(draws // len(plans), head_dim, seed * 1000 + index)
        signs = backend.encode(k, plan.encoder)
        decoded = [backend.decode(SignRows(signs, level)) for level in plan.levels]
        found.append([torch.einsum("nd,nhd->nh", q, rows).double() for rows in decoded])
        alpha = signs.scales[:, : plan.layout.groups].double()
        predicted.append([_variance(level, alpha, head_dim) for level in plan.levels])
    values = tuple(torch.cat(level) for level in zip(*found, strict=True))
    return Estimates(values, tuple(sum(level) / len(plans) for level in zip(*predicted, strict=True)))


def _variance(level: Expansion, alpha: Tensor, head_dim: int) -> float:
    """alpha^2 sum_r noise_r (E q)_r^2, averaged over unit q and tokens."""
    groups = torch.tensor(level.layout.word_groups[0][: level.read_words(0)]).repeat_interleave(32)
    of_rows = level.noise[0].double() * level.matrix[0].double().square().sum(dim=1) / head_dim
    return float((alpha.square().mean(dim=0)[groups] * of_rows).sum())


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def stored_variance(q: Tensor, expansion: Expansion, scales: Tensor) -> Tensor:
    """The mean variance of q's scores over the tokens of `scales` [N, S]: float32 [T, Hq]."""
    squares = sum_of_squares(scales, alpha_columns(expansion.layout))
    return score_variance(q, expansion, squares / len(scales))
