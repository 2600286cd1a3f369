"""A small question with a known answer, asked of the device before the server says SERVING."""

import torch

from kvstore_codecs.plan import SignPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import CodecSpec, ModelShape, Rotated
from kvstore_kernels import Backend, SignRows

SHAPE = ModelShape(layers=1, kv_heads=2, query_heads=4, head_dim=64, dtype="float32", sm_scale=0.125)
SPEC = CodecSpec(keys=Rotated(planes=4), values=Rotated(planes=4), mean="none")
TOKENS = 300
ERROR_MAX = 1e-2


class SelfCheckError(RuntimeError):
    """The device does not compute what it should."""


def self_check(backend: Backend) -> None:
    """Encodes, attends, and compares with attention over the decoded vectors; this compiles the ops as well.

    Raises SelfCheckError.
    """
    seeded = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, TOKENS, SHAPE.kv_heads, SHAPE.head_dim, generator=seeded)
    q = torch.randn(2, SHAPE.query_heads, SHAPE.head_dim, generator=seeded)
    rows = [_encoded(backend, x, plan) for x, plan in zip((keys, values), _plans(), strict=True)]
    found = (*backend.attend(q, *rows, sm_scale=SHAPE.sm_scale), *map(backend.decode, rows))
    out, lse, decoded_keys, decoded_values = backend.to_host(found)()
    expected_out, expected_lse = _attention(q, decoded_keys, decoded_values)
    error = max(float((out - expected_out).abs().max()), float((lse - expected_lse).abs().max()))
    if not error < ERROR_MAX:
        raise SelfCheckError(f"attention on {backend.name} is off by {error:.3g}")


def _plans() -> list[SignPlan]:
    plan = plan_for(SPEC, SHAPE, None)
    return [each for each in (plan.keys[0], plan.values[0]) if isinstance(each, SignPlan)]


def _encoded(backend: Backend, x: torch.Tensor, plan: SignPlan) -> SignRows:
    return SignRows(backend.encode(x, plan.encoder), plan.levels[0])


def _attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of q [T, Hq, D] over [N, H, D]: out and natural-log lse."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    logits = torch.einsum("thd,nhd->thn", q, keys) * SHAPE.sm_scale
    return torch.einsum("thn,nhd->thd", logits.softmax(2), values), logits.logsumexp(2)
