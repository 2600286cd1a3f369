from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")

from kvstore_client.demo.compare import agreement, prefill, through_store
from kvstore_client.demo.decoder import Decoder

from ..integrations.tiny import PREFIX, assert_same, prefilled, tiny_llama, token_ids


@torch.no_grad()
def test_teacher_forcing_through_an_exact_session_gives_the_prefills_logits() -> None:
    model, ids, steps = tiny_llama(), token_ids(100), []
    session, _ = prefilled(model, ids)
    _, exact = prefill(model, ids, 70, steps.append)
    stored = through_store(model, session, ids, 70, steps.append)
    assert_same(stored, exact)
    assert_same(exact, model(ids).logits[0, -70:])
    # Each block saw all before it in the store: blocks of 64, two layers.
    assert session.ends == [30, 30, 94, 94]
    assert steps == [30, 100, 64, 70]


def test_agreement_counts_what_is_decisive_and_measures_kl_from_the_exact_side() -> None:
    exact = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 1.0005], [3.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    stored = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 0.9], [0.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    found = agreement(exact, stored)
    assert (found.positions, found.agreeing, found.decisive, found.decisive_agreeing) == (4, 2, 3, 2)
    expected = torch.nn.functional.kl_div(
        stored.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.kl == pytest.approx(float(expected), rel=1e-4)


class Numerals:
    """A tokenizer whose text is its numbers."""

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, prompt: str, **_: object) -> Any:
        ids = torch.tensor([[int(word) for word in prompt.split()]])
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, tokens: list[int], **_: object) -> str:
        return " ".join(map(str, tokens))


def greedy(model: Any, count: int) -> list[int]:
    """The tiny model's own continuation of the stored prefix and `5 6`."""
    ids = torch.cat([token_ids(PREFIX), torch.tensor([[5, 6]])], dim=1)
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


def decoder_of(model: Any, eos_token_id: int) -> Decoder:
    tokenizer: Any = Numerals(eos_token_id)
    return Decoder(model, tokenizer, prefilled(model, token_ids(PREFIX))[0], "5 6")


@torch.no_grad()
def test_an_answer_in_two_parts_is_one_answer_and_every_step_is_timed() -> None:
    model = tiny_llama()
    decoder, expected, steps = decoder_of(model, eos_token_id=-1), greedy(model, 8), []
    first = decoder.decode(5, steps.append, whole=True)
    rest = decoder.decode(3, steps.append, whole=True)
    assert rest.text.split() == list(map(str, expected))
    assert first.text.split() == rest.text.split()[:5]
    assert (first.tokens, rest.tokens, steps) == (5, 3, [1, 2, 3, 4, 5, 6, 7, 8])
    assert (len(first.attend_seconds), len(rest.attend_seconds)) == (5 * 2, 3 * 2)
    assert decoder.session.moved() == 0.0


@torch.no_grad()
def test_an_answer_ends_early_only_in_its_last_part() -> None:
    model = tiny_llama()
    end_token = greedy(model, 3)[2]
    whole = decoder_of(model, end_token).decode(6, lambda _: None, whole=True)
    assert int(whole.text.split()[-1]) == end_token
    first = decoder_of(model, end_token).decode(6, lambda _: None, whole=False)
    assert first.tokens == 6
    assert str(end_token) not in first.text.split()
