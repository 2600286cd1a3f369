"""Supervised pairs, and adapters that learn from them together with a projection (LoRA, by peft)."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvstore_client.projections.student import Sample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK, ALPHA = 16, 32
"""Of the adapters, on every linear layer but the last, as published."""


def read_pairs(file: Path, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Sample]:
    """A sample of every line {"prompt", "response"}, of at most `length` tokens, the response's counting.

    ValueError, naming the line, for one that is no pair or whose prompt leaves no room.
    """
    samples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pair = json.loads(line)
            prompt, response = (tokenizer(pair[name])["input_ids"] for name in ("prompt", "response"))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{file.name}: line {number} is not {{"prompt": "...", "response": "..."}}') from None
        assert isinstance(prompt, list)
        assert isinstance(response, list)
        ids = [*prompt, *response, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])][:length]
        if not 0 < len(prompt) < len(ids):
            raise ValueError(f"{file.name}: line {number} has a prompt of {len(prompt)} of at most {length} tokens")
        samples.append(Sample(torch.tensor([ids]), torch.arange(1, len(ids)) >= len(prompt)))
    if not samples:
        raise ValueError(f"{file.name} has no pairs")
    return samples


def add_adapters(model: "PreTrainedModel", seed: int) -> "tuple[PeftModel, list[nn.Parameter]]":
    """Puts adapters into the model, which stays frozen; their parameters learn."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft asks newer transformers for what they call by another name
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]
