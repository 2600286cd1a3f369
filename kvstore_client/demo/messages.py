"""What the demo's processes tell each other."""

from dataclasses import dataclass


class Unusable(Exception):
    """The demo cannot work with what it was given; the text says why."""


@dataclass(frozen=True)
class Plan:
    """The same for all workers. Teacher forcing takes the last `compared` tokens of the text."""

    target: str
    lossy_session: str
    raw_session: str
    text: str
    tokens: int
    compared: int


@dataclass(frozen=True)
class Progress:
    """`total` None: nobody knows."""

    task: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Prefilled:
    tokens: int
    fp16_bytes: int
    stored_bytes: int
    prefill_seconds: float
    append_seconds: float


@dataclass(frozen=True)
class Agreement:
    """Next tokens against the model with its full exact cache, over `positions` of the text."""

    positions: int
    agreeing: int
    decisive: int
    """Positions whose two best logits are further apart than DECISIVE_GAP."""
    decisive_agreeing: int
    kl: float
    """Mean KL(exact || store), nats."""


@dataclass(frozen=True)
class Compared:
    raw: Agreement
    lossy: Agreement


@dataclass(frozen=True)
class Answered:
    """Some tokens of an answer, with its text from the beginning; `attend_seconds` has one value a layer and token."""

    text: str
    tokens: int
    seconds: float
    attend_seconds: list[float]


@dataclass(frozen=True)
class Continued:
    """The answer's rest, after the restart, and how far the store's answer to one query moved."""

    answer: Answered
    attention_moved: float
