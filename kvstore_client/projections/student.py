"""A model whose stored keys and values go through bases that learn, beside the model as it is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kvstore_client.projections.attention import LayerCall, answering
from kvstore_client.projections.bases import Coordinates
from kvstore_client.projections.erring import erring
from kvstore_client.projections.surrogates import KEPT, Codec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Student:
    """Attention of one text as `codec` would have it, `amounts` [kinds, L, H] kept of every head."""

    codec: Codec
    coordinates: Coordinates
    amounts: Tensor

    def __call__(self, call: LayerCall) -> Tensor:
        at, layer, x = self.coordinates, call.layer, torch.stack([call.k, call.v])
        mean = at.mean[:, layer].unsqueeze(2)
        z = (x - mean) @ at.basis[:, layer]
        kept = KEPT[self.codec](z, at.weights[:, layer], self.amounts[:, layer])
        return erring(call, *(mean + kept @ at.inverse[:, layer] - x))


@dataclass(frozen=True, eq=False)
class Sample:
    """One text [1, T]; `learned` [T - 1] says of which positions the next token counts."""

    ids: Tensor
    learned: Tensor

    @classmethod
    def whole(cls, ids: Tensor) -> "Sample":
        return cls(ids, torch.ones(ids.shape[1] - 1, dtype=torch.bool))


def logits_of(model: "PreTrainedModel", sample: Sample) -> Tensor:
    """[positions that count, vocabulary], of the model as it is."""
    with torch.no_grad():
        return _counted(model, sample)


def student_logits(model: "PreTrainedModel", sample: Sample, student: Student) -> Tensor:
    """[positions that count, vocabulary]."""
    with answering(model, student):
        return _counted(model, sample)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher || student) of logits."""
    p, q = (log_softmax(logits.float(), -1) for logits in (teacher, student))
    return kl_div(q, p, log_target=True, reduction="batchmean")


def loss_of(student: Tensor, sample: Sample) -> Tensor:
    """Mean cross entropy of the tokens that count."""
    return cross_entropy(student.float(), sample.ids[0, 1:][sample.learned].to(student.device))


def _counted(model: "PreTrainedModel", sample: Sample) -> Tensor:
    device = next(model.parameters()).device
    logits = model(sample.ids.to(device), use_cache=False).logits[0, :-1]
    return logits[sample.learned.to(device)]
