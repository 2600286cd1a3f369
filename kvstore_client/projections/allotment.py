"""What each head of a model keeps under a budget: bits a number (`matryoshka`) or a share of coordinates (`projected`).

Water-filling over all layers, heads and both kinds by a projection's weights, as a session with that codec does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore_client.projections.surrogates import Codec
from kvstore_codecs.allocation import PLANES_MAX, ranks_of, words_of
from kvstore_codecs.artifact import Projection
from kvstore_codecs.fitted import budget_weights
from kvstore_codecs.spec import KINDS
from kvstore_kernels.types import WORD_ROWS

PREFIX: dict[Codec, str] = {"matryoshka": "words", "projected": "ranks"}


def allotted(codec: Codec, projection: Projection, budget: float) -> Tensor:
    """Words or coordinates int32 [kinds, L, H], by the weights alone."""
    header = projection.header
    weights = torch.cat(
        [budget_weights(projection, layer, kind)[None] for kind in KINDS for layer in range(header.layers)]
    )
    found = words_of(weights, budget) if codec == "matryoshka" else ranks_of(weights, budget)
    return torch.from_numpy(found).int().view(len(KINDS), header.layers, header.kv_heads)


def check_budgets(codec: Codec, budgets: Sequence[float]) -> None:
    """ValueError unless there is one at least and a codec takes each."""
    most = PLANES_MAX if codec == "matryoshka" else 1
    if not budgets:
        raise ValueError("no budget is given")
    for budget in budgets:
        if not 0 < budget <= most:
            raise ValueError(f"budget {budget:g} is outside (0, {most}]")


def most_of(codec: Codec, head_dim: int) -> int:
    """What a head can keep."""
    return PLANES_MAX * head_dim // WORD_ROWS if codec == "matryoshka" else head_dim
