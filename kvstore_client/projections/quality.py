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
from kvstore_client.projections.placing import placed
from kvstore_codecs.plan import CodecPlan, SignPlan
from kvstore_codecs.projected import ProjectedRows, decode, project
from kvstore_codecs.spec import Kind
from kvstore_kernels.backend import Backend, ReferenceBackend
from kvstore_kernels.types import SignRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_TOKENS = 256


@dataclass(frozen=True)
class Quality:
    """Against the exact model on the same tokens: perplexities, mean KL(exact || codec), how often the best agrees.

    `output_error` is the error of attention outputs over their size, both root mean square over layers and tokens, each
    layer given what it sees.
    """

    perplexity: float
    perplexity_exact: float
    kl: float
    top1: float
    output_error: float

    @property
    def perplexity_rise(self) -> float:
        return self.perplexity / self.perplexity_exact - 1


@dataclass(frozen=True)
class Seen:
    """Keys and values of one text in the exact model, [layers, T, H, D], in host memory."""

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
    sums = {name: torch.zeros(7, dtype=torch.float64) for name in rows}
    with torch.inference_mode():
        for index, ids in enumerate(texts if rows else ()):
            exact, seen = exact_pass(model, ids := ids.to(model.device))
            for number, (name, row) in enumerate(rows.items()):
                attention = row(seen)
                with answering(model, attention):
                    coded = model(ids, use_cache=False).logits[0, from_token:-1]
                found = compared(exact[from_token:-1], coded, ids[0, from_token + 1 :])
                sums[name] += torch.cat([found, attention.errors.cpu()])
                done(index * len(rows) + number + 1)
    return {name: quality_of(total) for name, total in sums.items()}


def exact_pass(
    model: "PreTrainedModel", ids: Tensor, also: Callable[[LayerCall], None] = lambda call: None
) -> tuple[Tensor, Seen]:
    """Logits [T, vocabulary] and what attention saw, which `also` gets layer by layer."""
    calls: list[LayerCall] = []

    def answer(call: LayerCall) -> Tensor:
        calls.append(call)
        also(call)
        return torch.stack([causal_weights(call, head) @ call.v[head // call.group] for head in range(len(call.q))])

    with answering(model, answer):
        logits = model(ids, use_cache=False).logits[0]
    keys, values = (
        torch.stack([x.transpose(0, 1).cpu() for x in xs]) for xs in zip(*((c.k, c.v) for c in calls), strict=True)
    )
    return logits, Seen(keys, values)


def compared(exact: Tensor, coded: Tensor, targets: Tensor) -> Tensor:
    """Sums over tokens: loss, exact loss, KL, agreement; and how many."""
    return torch.stack(list(_blocks(exact, coded, targets))).sum(0).cpu()


def _blocks(exact: Tensor, coded: Tensor, targets: Tensor) -> Iterator[Tensor]:
    for one, other, target in zip(
        exact.split(BLOCK_TOKENS), coded.split(BLOCK_TOKENS), targets.split(BLOCK_TOKENS), strict=True
    ):
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (one, other))
        losses = [-log.gather(1, target[:, None]).sum() for log in (q, p)]
        same = (one.argmax(-1) == other.argmax(-1)).double().sum()
        yield torch.stack([*losses, (p.exp() * (p - q)).sum(), same, torch.full_like(same, len(one))])


def quality_of(sums: Tensor) -> Quality:
    """Of the sums of `compared` and, where they were taken, squares of attention errors and of outputs."""
    loss, loss_exact, kl, same = sums[:4] / sums[4]
    error = (sums[5] / sums[6]).sqrt().item() if len(sums) > 5 and sums[6] else 0.0
    return Quality(loss.exp().item(), loss_exact.exp().item(), kl.item(), same.item(), error)


class CodedAttention:
    """Attention of one text, stored tokens read at `level`; the first `exact_end` tokens stay exact.

    The ops run on the device of what they are given; a backend's own where that is the CPU.
    """

    def __init__(self, plan: CodecPlan, backend: Backend, *, level: int = 0, exact_end: int = SINK_TOKENS) -> None:
        self._plan, self._backend, self._level, self._exact_end = plan, backend, level, exact_end
        self.errors = torch.zeros(2, dtype=torch.float64)
        """Sums of squares: of what outputs are off, and of outputs."""

    def __call__(self, call: LayerCall) -> Tensor:
        stored = stored_mask(call.q.shape[1], call.q.device)
        stored[:, : self._exact_end] = False
        k, noise = self._coded(call, "keys", call.k)
        v, _ = self._coded(call, "values", call.v)
        outputs = []
        future = torch.full(stored.shape, -torch.inf, device=call.q.device).triu(1)
        for kv, q in enumerate(call.q.unflatten(0, (-1, call.group))):
            exact = q @ call.k[kv].T * call.sm_scale + future
            read = q @ k[kv].T * call.sm_scale + future
            if noise is not None:
                read -= noise(q, kv) * (call.sm_scale**2 / 2)
            weights = torch.softmax(torch.where(stored, read, exact), -1)
            outputs.append((weights * ~stored) @ call.v[kv] + (weights * stored) @ v[kv])
            wanted = torch.softmax(exact, -1) @ call.v[kv]
            sums = [(outputs[-1] - wanted).double().square().sum(), wanted.double().square().sum()]
            self.errors = self.errors.to(call.q.device) + torch.stack(sums)
        return torch.cat(outputs)

    def _coded(self, call: LayerCall, kind: Kind, x: Tensor) -> tuple[Tensor, Callable[[Tensor, int], Tensor] | None]:
        """x^ [H, T, D] as it comes back, and the share of its scores' variance [G, T, N] that attention takes off."""
        plan = placed(self._plan.of(call.layer, kind), x.device)
        backend = self._backend if x.device.type == "cpu" else ReferenceBackend()
        rows = x.transpose(0, 1).contiguous()
        if plan.widths is None:
            return x, None
        if not isinstance(plan, SignPlan):
            return decode(backend, ProjectedRows(project(rows, plan).scales, plan)).transpose(0, 1), None
        signs = backend.encode(rows, plan.encoder)
        level = plan.levels[min(self._level, len(plan.levels) - 1)]

        def noise(q: Tensor, head: int) -> Tensor:
            start, end = plan.layout.scale_starts[head : head + 2]
            alpha = signs.scales[:, start:end].float().square().sum(1)
            return plan.debias * ((q @ level.matrix[head].T).square() @ level.noise[head])[..., None] * alpha

        decoded = backend.decode(SignRows(signs, level)).transpose(0, 1)
        return decoded, noise if plan.debias and plan.layout.groups == 1 else None
