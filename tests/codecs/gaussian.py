"""QJL as the paper has it, with independent Gaussian rows: what the orthogonal blocks are compared with."""

from dataclasses import replace
from functools import lru_cache

import torch

from kvstore_codecs.plan import SignPlan
from kvstore_codecs.spec import Qjl
from kvstore_kernels.types import SignEncoder
from tests.codecs.inputs import DRAWS, RHOS, Estimates, seeded, sign_plan, simulate

_BASES = 256
_HEAD_DIM = 32


@lru_cache(maxsize=8)
def gaussian_estimates(bits: int, draws: int = DRAWS) -> Estimates:
    """As `inputs.estimates`, with the norm rule, one level and many bases; its law does not depend on head_dim."""
    plan = sign_plan(Qjl(bits=bits, scale="paper"), _HEAD_DIM, kv_heads=len(RHOS))
    return simulate([_gaussian(plan, bits, seed) for seed in range(_BASES)], _HEAD_DIM, draws=draws)


def _gaussian(plan: SignPlan, bits: int, seed: int) -> SignPlan:
    assert isinstance(plan.encoder, SignEncoder)
    s = torch.randn(bits, _HEAD_DIM, generator=seeded(seed))
    heads = (replace(plan.encoder.heads[0], projection=s),) * len(RHOS)
    finest = replace(plan.levels[0], matrix=(s,) * len(RHOS))
    return SignPlan(plan.layout, replace(plan.encoder, heads=heads), (finest,))
