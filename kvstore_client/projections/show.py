"""`kvstore projections show`."""

from pathlib import Path

from kvstore_codecs.artifact import read_projection
from kvstore_codecs.spec import KINDS


def show(file: Path) -> None:
    """Prints what a projection is; ValueError if it is none."""
    data = file.read_bytes()
    projection = read_projection(data)
    print(f"sha256 {projection.sha256}\nbytes {len(data):,}")
    for name, value in projection.header.model_dump().items():
        print(f"{name} {value}")
    for kind in KINDS:
        weights = projection.basis(kind).weights
        top = (weights[..., :8].sum(-1) / weights.sum(-1)).mean().item()
        print(f"{kind}: the first 8 of {weights.shape[-1]} coordinates hold {top:.0%} of the weight on average")
