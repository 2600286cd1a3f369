"""What a load test does."""

from dataclasses import dataclass
from pathlib import Path

from kvstore_codecs.named import codec_named, shape_named
from kvstore_codecs.spec import CodecSpec, ModelShape

SCENARIOS = {
    "ingest": "every worker appends to a session of its own",
    "decode": "all workers attend to one shared session, layer after layer",
    "private": "every worker attends to a session of its own",
    "retrieval": "all workers ask one shared session for its top-k positions",
    "mixed": "of ten requests eight attend, one asks for the top k, one appends",
    "failover": "mixed, on two replicas of its own that are killed and started again in turn",
    "trace": "requests of a trace: match a prefix, append the rest, then decode",
}


@dataclass(frozen=True)
class Load:
    """`workers` connections, spread over `processes`, that together make `rate` requests a second, open loop."""

    targets: tuple[str, ...]
    """Replicas of one store."""
    scenario: str = "decode"
    model: str = "smollm2-135m"
    """As `shape_named` reads it."""
    codec: str = ""
    """As `codec_named` reads it; empty leaves it to the server."""
    tokens: int = 4096
    """Of every session that is attended to."""
    append_tokens: int = 256
    top_k: int = 64
    workers: int = 8
    processes: int = 1
    rate: float = 50.0
    seconds: float = 10.0
    timeout_seconds: float = 10.0
    """Of one request; with the rate it bounds how many are in flight."""
    trace: Path | None = None
    trace_speed: float = 1.0
    """How much faster than it was recorded."""
    trace_block_tokens: int = 512
    """Tokens that stand for one block of the trace, which has 512."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario {self.scenario!r} is not one of {', '.join(SCENARIOS)}")
        if (self.scenario == "trace") != (self.trace is not None):
            raise ValueError("scenario trace and a trace file belong together")
        positive = ("tokens", "append_tokens", "top_k", "workers", "processes", "rate", "seconds", "timeout_seconds")
        for name in (*positive, "trace_speed", "trace_block_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.processes > self.workers:
            raise ValueError(f"processes {self.processes} are more than workers {self.workers}")
        if self.top_k > self.tokens:
            raise ValueError(f"top_k {self.top_k} is more than tokens {self.tokens}")
        assert self.shape is not None
        assert self.spec is None or self.codec

    @property
    def shape(self) -> ModelShape:
        return shape_named(self.model)

    @property
    def spec(self) -> CodecSpec | None:
        """None: the server's default."""
        return codec_named(self.codec) if self.codec else None

    @property
    def retries(self) -> bool:
        """Only where servers are killed: otherwise every failure is to be seen."""
        return self.scenario == "failover"

    def workers_of(self, process: int) -> list[int]:
        return list(range(process, self.workers, self.processes))
