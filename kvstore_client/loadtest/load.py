"""What a load test does."""

from dataclasses import dataclass

from kvstore_client.loadtest.shapes import SHAPES
from kvstore_codecs.spec import ModelShape


@dataclass(frozen=True)
class Load:
    """`workers` connections attend to one session of `tokens` tokens, together `rate` times a second."""

    target: str
    model: str = "smollm2-135m"
    """A name in SHAPES."""
    tokens: int = 4096
    workers: int = 8
    rate: float = 50.0
    seconds: float = 10.0
    timeout_seconds: float = 10.0
    """Of one request; with the rate it bounds how many are in flight."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in SHAPES:
            raise ValueError(f"model {self.model!r} is not one of {', '.join(SHAPES)}")
        for name in ("tokens", "workers", "rate", "seconds", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    @property
    def shape(self) -> ModelShape:
        return SHAPES[self.model]
