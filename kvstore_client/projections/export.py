"""A projection made from another one: its header with what changed, its tensors with what was learned."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvstore_client.projections.allotment import PREFIX
from kvstore_client.projections.bases import TrainableBases
from kvstore_client.projections.surrogates import Codec
from kvstore_codecs.artifact import Projection, write_projection
from kvstore_codecs.spec import KINDS


def digest_of_texts(texts: Sequence[Tensor]) -> str:
    """sha256 over token ids, text after text."""
    return hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in texts)).hexdigest()


def trained_projection(
    start: Projection,
    bases: TrainableBases,
    texts: Sequence[Tensor],
    method: str,
    seed: int,
    measured: dict[str, float],
) -> bytes:
    """Without allotments: those of the start were searched for in other bases."""
    found = bases.exactly()
    parts = {name: part for name, part in start.parts.items() if name.endswith(".metric")}
    for index, kind in enumerate(KINDS):
        parts[f"{kind}.basis"] = found.basis[index].float()
        parts[f"{kind}.weights"] = found.weights[index].float()
        parts[f"{kind}.mean"] = found.mean[index].float()
    changed = {
        "method": f"{method} from {start.sha256[:12]} ({start.header.method})"[:256],
        "seed": seed,
        "data_sha256": digest_of_texts(texts),
        "measured": measured,
        "budgets": (),
        "shares": (),
    }
    return write_projection(start.header.model_copy(update=changed), parts)


def searched_projection(
    start: Projection, codec: Codec, found: Mapping[float, Tensor], method: str, measured: dict[str, float]
) -> bytes:
    """With these amounts [kinds, L, H] by budget, beside those that the start has for others."""
    field = "budgets" if codec == "matryoshka" else "shares"
    amounts = {f"{PREFIX[codec]}.{budget:g}": each.to(torch.int32).contiguous() for budget, each in found.items()}
    changed = {
        "method": f"{method} from {start.sha256[:12]} ({start.header.method})"[:256],
        field: tuple(dict.fromkeys((*getattr(start.header, field), *found))),
        "measured": {**start.header.measured, **measured},
    }
    return write_projection(start.header.model_copy(update=changed), {**start.parts, **amounts})
