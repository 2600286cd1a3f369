"""Training of bases and means with gradients: a projection as MatryoshkaKV trains it (arXiv 2410.14731).

Every step each layer, KV head and kind keeps what one budget of several would leave it, drawn for it alone, so that
what is learned is good at all of them: coordinates with `projected`, sign planes with `matryoshka`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from kvstore_client.projections.allotment import allotted
from kvstore_client.projections.bases import TrainableBases
from kvstore_client.projections.student import Sample, Student, divergence, logits_of, loss_of, student_logits
from kvstore_client.projections.surrogates import Codec
from kvstore_codecs.artifact import Projection
from kvstore_codecs.basis import random_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRADIENT_NORM_MAX = 1.0
BUDGETS: dict[Codec, tuple[float, ...]] = {
    "matryoshka": (1.0, 1.5, 2.0, 2.5, 3.0),
    "projected": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
}


@dataclass(frozen=True)
class TrainingSettings:
    """What makes a training what it is; equal settings, data and start give equal bases on one machine's CPU."""

    codec: Codec
    steps: int
    budgets: tuple[float, ...]
    kl_share: float = 0.25
    """Of the loss: KL(teacher || student); the rest is the text's cross entropy."""
    learning_rate: float = 1e-3
    adapter_learning_rate: float = 5e-5
    warmup_steps: int = 100
    batch: int = 1
    """Texts a step."""
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """What one step came to, means over its texts; `kl` is 0 where the loss has none of it."""

    number: int
    loss: float
    kl: float


class Training:
    """One training, from its start or a checkpoint; `adapters` are a model's own parameters that learn too."""

    def __init__(
        self,
        model: "PreTrainedModel",
        start: Projection,
        settings: TrainingSettings,
        adapters: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model, self.settings = model, settings
        self._device = next(model.parameters()).device
        self.start, self.adapters = start, list(adapters)
        self.bases = TrainableBases(start).to(self._device)
        self._learning = [*self.bases.parameters(), *adapters]
        groups = [{"params": list(self.bases.parameters()), "lr": settings.learning_rate}]
        if adapters:
            groups.append({"params": self.adapters, "lr": settings.adapter_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._table = torch.stack([allotted(settings.codec, start, budget) for budget in settings.budgets])
        self.losses: list[float] = []

    @property
    def done(self) -> int:
        return len(self.losses)

    def run(self, samples: Sequence[Sample]) -> Iterator[Step]:
        """The steps that are left, one after the other."""
        with torch.enable_grad():
            while self.done < self.settings.steps:
                yield self._step([samples[index] for index in self._drawn(len(samples))])

    def _step(self, samples: list[Sample]) -> Step:
        amounts, loss_sum, kl_sum = self._amounts().to(self._device), 0.0, 0.0
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._warmth()
        self.optimizer.zero_grad()
        for sample in samples:
            logits = student_logits(self.model, sample, Student(self.settings.codec, self.bases(), amounts))
            kl = self._kl(sample, logits)
            loss = self.settings.kl_share * kl + (1 - self.settings.kl_share) * loss_of(logits, sample)
            (loss / len(samples)).backward()
            loss_sum, kl_sum = loss_sum + loss.item() / len(samples), kl_sum + kl.item() / len(samples)
        clip_grad_norm_(self._learning, GRADIENT_NORM_MAX)
        self.optimizer.step()
        self.losses.append(loss_sum)
        return Step(self.done, loss_sum, kl_sum)

    def _kl(self, sample: Sample, logits: Tensor) -> Tensor:
        if not self.settings.kl_share:
            return torch.zeros(())
        return divergence(logits_of(self.model, sample), logits)

    def _generator(self, *parts: int) -> torch.Generator:
        """Of this place in the training alone, so that a resumed one draws the same."""
        name = "/".join(map(str, (self.settings.seed, *parts)))
        return torch.Generator().manual_seed(int.from_bytes(random_bytes(name, 7)))

    def _drawn(self, count: int) -> list[int]:
        """Texts of the next step: all come once before any comes again."""
        places = range(self.done * self.settings.batch, (self.done + 1) * self.settings.batch)
        orders = {p // count: torch.randperm(count, generator=self._generator(0, p // count)) for p in places}
        return [int(orders[p // count][p % count]) for p in places]

    def _amounts(self) -> Tensor:
        """[kinds, L, H]."""
        heads = self._table.shape[1:]
        choice = torch.randint(len(self._table), heads, generator=self._generator(1, self.done))
        return self._table.gather(0, choice.unsqueeze(0))[0]

    def _warmth(self) -> float:
        """Of the learning rate: linear to the end of the warm-up, then half a cosine to 0."""
        warm = min(self.settings.warmup_steps, self.settings.steps // 10)
        if self.done < warm:
            return (self.done + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (self.done - warm) / (self.settings.steps - warm)))
