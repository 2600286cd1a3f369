"""Statistics of a model's attention over a text: moments of keys and values, and what their errors cost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore_client.projections.attention import SINK_TOKENS, LayerCall, causal_weights, stored_mask
from kvstore_codecs.artifact import Metric
from kvstore_codecs.fit import Moments
from kvstore_codecs.spec import Kind, ModelShape


@dataclass
class LayerStatistics:
    """One layer: moments of what would be stored, and metrics of its errors [H, D, D], sums over query rows.

    An error e of a key or value moves the layer's output by about sqrt(e^T M e) of the residual stream that enters the
    layer, M the output metric; it moves logits by sqrt(e^T M e), M the query metric.
    """

    keys: Moments
    values: Moments
    output_keys: Tensor
    output_values: Tensor
    query: Tensor
    rows: int = 0

    def metric(self, kind: Kind, metric: Metric) -> Tensor | None:
        if metric == "output":
            return (self.output_keys if kind == "keys" else self.output_values) / self.rows
        return self.query / self.rows if metric == "query" and kind == "keys" else None

    def moments(self, kind: Kind) -> Moments:
        return self.keys if kind == "keys" else self.values


class Gatherer:
    """Answers a model's attention exactly and takes statistics while it does."""

    def __init__(self, shape: ModelShape) -> None:
        heads, d = shape.kv_heads, shape.head_dim

        def layer() -> LayerStatistics:
            keys, values, query = torch.zeros(3, heads, d, d, dtype=torch.float64)
            return LayerStatistics(Moments(heads, d), Moments(heads, d), keys, values, query)

        self.layers = [layer() for _ in range(shape.layers)]

    def __call__(self, call: LayerCall) -> Tensor:
        found = self.layers[call.layer]
        found.keys.add(call.k[:, SINK_TOKENS:].transpose(0, 1).cpu())
        found.values.add(call.v[:, SINK_TOKENS:].transpose(0, 1).cpu())
        found.rows += call.q.shape[1]
        stored = stored_mask(call.q.shape[1], call.q.device)
        share = 1 / call.residual.square().sum(1)
        outputs = []
        for head in range(call.q.shape[0]):
            weights = causal_weights(call, head)
            outputs.append(weights @ call.v[head // call.group])
            self._add(found, call, head, outputs[-1], (weights * stored).square_(), share)
        return torch.stack(outputs)

    @staticmethod
    def _add(found: LayerStatistics, call: LayerCall, head: int, out: Tensor, squares: Tensor, share: Tensor) -> None:
        """One query head; `squares` [T, N] are p^2 of stored tokens, `share` [T] is 1 / |h|^2.

        Key errors: the output moves by sum_n p_n (v_n - o) <q, e_n> sm_scale, and errors of tokens are independent:
        w = sm_scale^2 sum_n p_n^2 |W (v_n - o)|^2, W the head's part of the output projection.
        """
        kv, q, v = head // call.group, call.q[head], call.v[head // call.group]
        gram = call.output[:, head].T @ call.output[:, head]
        seen_v, seen_o = v @ gram, out @ gram
        moved = (squares * ((seen_v * v).sum(1) - 2 * seen_o @ v.T)).sum(1) + squares.sum(1) * (seen_o * out).sum(1)
        w = (call.sm_scale**2 * moved.clamp(min=0) * share).double()
        found.output_keys[kv] += ((q.double() * w[:, None]).T @ q.double()).cpu()
        found.output_values[kv] += ((squares.sum(1) * share).double().sum() * gram.double()).cpu()
        found.query[kv] += call.sm_scale**2 * (q.double().T @ q.double()).cpu()
