"""What a codec costs a model: perplexity and the next token's distribution, with everything stored going through it.

Whole texts at once, with the ops alone: token t reads the sinks and its newest tokens exactly, all others as they would
come back from a store.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore_client.projections.attention import SINK_TOKENS, LayerCall, answering, causal_weights, stored_mask
from kvstore_codecs.plan import CodecPlan, SignPlan
from kvstore_codecs.projected import ProjectedRows, decode, project
from kvstore_codecs.spec import Kind
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import SignRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_TOKENS = 256


@dataclass(frozen=True)
class Quality:
    """Against the exact model on the same tokens: perplexities, mean KL(exact || codec), how often the best agrees."""

    perplexity: float
    perplexity_exact: float
    kl: float
    top1: float

    @property
    def perplexity_rise(self) -> float:
        return self.perplexity / self.perplexity_exact - 1


@dataclass(frozen=True)
class Seen:
    """Keys and values of one text in the exact model, [layers, T, H, D]."""

    keys: Tensor
    values: Tensor


Row = Callable[[Seen], "CodedAttention"]
"""What attends to a text in place of the model, given what the exact model saw."""


def measure(
    model: "PreTrainedModel",
    texts: Sequence[Tensor],
    rows: Mapping[str, Row],
    *,
    from_token: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Quality]:
    """Each row over texts [1, T], from `from_token` of each on; `done` gets how many (text, row) pairs are behind."""
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in rows}
    with torch.inference_mode():
        for index, ids in enumerate(texts):
            exact, seen = _exact(model, ids)
            for number, (name, row) in enumerate(rows.items()):
                with answering(model, row(seen)):
                    coded = model(ids, use_cache=False).logits[0, from_token:-1]
                sums[name] += _compared(exact[from_token:-1], coded, ids[0, from_token + 1 :])
                done(index * len(rows) + number + 1)
    return {name: _quality(total) for name, total in sums.items()}


def _exact(model: "PreTrainedModel", ids: Tensor) -> tuple[Tensor, Seen]:
    """Logits [T, vocabulary] and what attention saw."""
    calls: list[LayerCall] = []

    def answer(call: LayerCall) -> Tensor:
        calls.append(call)
        return torch.stack([causal_weights(call, head) @ call.v[head // call.group] for head in range(len(call.q))])

    with answering(model, answer):
        logits = model(ids, use_cache=False).logits[0]
    keys, values = (
        torch.stack([x.transpose(0, 1) for x in xs]) for xs in zip(*((c.k, c.v) for c in calls), strict=True)
    )
    return logits, Seen(keys, values)


def _compared(exact: Tensor, coded: Tensor, targets: Tensor) -> Tensor:
    """Sums over tokens: loss, exact loss, KL, agreement; and how many."""
    return torch.stack(list(_blocks(exact, coded, targets))).sum(0)


def _blocks(exact: Tensor, coded: Tensor, targets: Tensor) -> Iterator[Tensor]:
    for one, other, target in zip(
        exact.split(BLOCK_TOKENS), coded.split(BLOCK_TOKENS), targets.split(BLOCK_TOKENS), strict=True
    ):
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (one, other))
        losses = [-log.gather(1, target[:, None]).sum() for log in (q, p)]
        same = (one.argmax(-1) == other.argmax(-1)).double().sum()
        yield torch.stack(
            [*losses, (p.exp() * (p - q)).sum(), same, torch.tensor(float(len(one)), dtype=torch.float64)]
        )


def _quality(sums: Tensor) -> Quality:
    loss, loss_exact, kl, same = sums[:4] / sums[4]
    return Quality(loss.exp().item(), loss_exact.exp().item(), kl.item(), same.item())


class CodedAttention:
    """Attention of one text, stored tokens read at `level`; the first `exact_end` tokens stay exact."""

    def __init__(self, plan: CodecPlan, backend: Backend, *, level: int = 0, exact_end: int = SINK_TOKENS) -> None:
        self._plan, self._backend, self._level, self._exact_end = plan, backend, level, exact_end

    def __call__(self, call: LayerCall) -> Tensor:
        stored = stored_mask(call.q.shape[1])
        stored[:, : self._exact_end] = False
        k, noise = self._coded(call, "keys", call.k)
        v, _ = self._coded(call, "values", call.v)
        outputs = []
        future = torch.full(stored.shape, -torch.inf).triu(1)
        for head, q in enumerate(call.q):
            kv = head // call.group
            read = q @ k[kv].T * call.sm_scale
            if noise is not None:
                read -= noise(q, kv) * (call.sm_scale**2 / 2)
            logits = torch.where(stored, read, q @ call.k[kv].T * call.sm_scale)
            weights = torch.softmax(logits + future, -1)
            outputs.append((weights * ~stored) @ call.v[kv] + (weights * stored) @ v[kv])
        return torch.stack(outputs)

    def _coded(self, call: LayerCall, kind: Kind, x: Tensor) -> tuple[Tensor, Callable[[Tensor, int], Tensor] | None]:
        """x^ [H, T, D] as it comes back, and the share of its scores' variance [T, N] that attention takes off."""
        plan = self._plan.of(call.layer, kind)
        rows = x.transpose(0, 1).contiguous()
        if plan.widths is None:
            return x, None
        if not isinstance(plan, SignPlan):
            return decode(self._backend, ProjectedRows(project(rows, plan).scales, plan)).transpose(0, 1), None
        signs = self._backend.encode(rows, plan.encoder)
        level = plan.levels[min(self._level, len(plan.levels) - 1)]

        def noise(q: Tensor, head: int) -> Tensor:
            start, end = plan.layout.scale_starts[head : head + 2]
            alpha = signs.scales[:, start:end].float().square().sum(1)
            return plan.debias * ((q @ level.matrix[head].T).square() @ level.noise[head])[:, None] * alpha

        decoded = self._backend.decode(SignRows(signs, level)).transpose(0, 1)
        return decoded, noise if plan.debias and plan.layout.groups == 1 else None
