"""Facts planted in a long text, asked for at its end: does the model still find them behind a codec?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore_client.projections.attention import answering
from kvstore_client.projections.quality import Row, exact_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
EXACT = "exact"
_CITIES = ("Paris", "Lima", "Oslo", "Cairo", "Delhi", "Quito", "Seoul", "Rome")


@dataclass(frozen=True)
class Needle:
    """`ids` [1, length] end with the question and the `answer` last tokens, of which the model must name each."""

    length: int
    depth: float
    ids: Tensor
    answer: int


def needles(
    text: Tensor, tokenizer: "PreTrainedTokenizerBase", lengths: Sequence[int], each: int, seed: int
) -> list[Needle]:
    """`each` facts at every depth of every length, in stretches of text [1, N]; ValueError if it is too short."""
    random = Random(seed)  # noqa: S311
    found = []
    for length in lengths:
        for depth in DEPTHS:
            for _ in range(each):
                city, number = random.choice(_CITIES), random.randint(10_000, 99_999)
                fact = f"\nThe pass key of {city} is {number}. Remember it: {number} is the pass key of {city}.\n"
                question = f"\nWhat is the pass key of {city}? The pass key of {city} is"
                parts = [_ids(tokenizer, part) for part in (fact, question, f" {number}")]
                room = length - sum(part.shape[1] for part in parts)
                if text.shape[1] <= room:
                    raise ValueError(f"the text has {text.shape[1]} tokens, {room} are needed for needles")
                start = random.randrange(text.shape[1] - room)
                hay, cut = text[:, start : start + room], int(depth * room)
                ids = torch.cat([hay[:, :cut], parts[0], hay[:, cut:], *parts[1:]], 1)
                found.append(Needle(length, depth, ids, parts[2].shape[1]))
    return found


def recall(
    model: "PreTrainedModel", asked: Sequence[Needle], rows: Mapping[str, Row], done: Callable[[int], None]
) -> dict[str, dict[tuple[int, float], float]]:
    """The share of facts that greedy decoding names in full, by row, length and depth; row `exact` is the model's own.

    Every token of the answer must be the best one behind those before it: decoding then gives just the answer.
    """
    names = [EXACT, *rows]
    hits: dict[str, dict[tuple[int, float], list[bool]]] = {name: {} for name in names}
    with torch.inference_mode():
        for index, needle in enumerate(asked):
            ids = needle.ids.to(model.device)
            exact, seen = exact_pass(model, ids)
            for number, name in enumerate(names):
                logits = exact
                if name != EXACT:
                    with answering(model, rows[name](seen)):
                        logits = model(ids, use_cache=False, logits_to_keep=needle.answer + 1).logits[0]
                best = logits[-needle.answer - 1 : -1].argmax(-1)
                hit = bool((best == ids[0, -needle.answer :]).all())
                hits[name].setdefault((needle.length, needle.depth), []).append(hit)
                done(index * len(names) + number + 1)
    return {name: {place: sum(each) / len(each) for place, each in places.items()} for name, places in hits.items()}


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tensor:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert isinstance(ids, Tensor)
    return ids
