"""A text as the token sequences that a model is run over."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sequences(file: Path, tokenizer: "PreTrainedTokenizerBase", length: int, count: int, skip: int = 0) -> list[Tensor]:
    """`count` sequences [1, length] of the file's tokens, from token `skip` on; ValueError if it has too few."""
    ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
    assert isinstance(ids, Tensor)
    end = skip + count * length
    if ids.shape[1] < end:
        raise ValueError(f"{file.name} has {ids.shape[1]} tokens, {end} are needed")
    return list(torch.split(ids[:, skip:end], length, dim=1))
