"""Mooncake's public trace format: one JSON object a line, {"timestamp", "input_length", "output_length", "hash_ids"}.

Timestamps are milliseconds; each hash id names one block of 512 tokens together with all before it
(github.com/kvcache-ai/Mooncake, FAST25-release/traces).
"""

import json
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class TraceRequest:
    """`due` seconds after the start, a prompt of `tokens` tokens is there and `steps` tokens are decoded."""

    due: float
    tokens: int
    steps: int
    blocks: tuple[int, ...]
    """Equal ids are equal blocks; the last one may be partial."""


def read_trace(file: Path, *, speed: float, block_tokens: int, seconds: float) -> list[TraceRequest]:
    """What is due within `seconds`, in order; lengths are scaled by `block_tokens` / 512.

    ValueError that names the line which is not of the format.
    """
    requests: list[TraceRequest] = []
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                requests.append(_request(json.loads(line), speed, block_tokens))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number} is not of Mooncake's trace format: {error!r}") from None
    first = min((request.due for request in requests), default=0.0)
    if first:
        requests = [TraceRequest(r.due - first, r.tokens, r.steps, r.blocks) for r in requests]
    return sorted((request for request in requests if request.due < seconds), key=lambda request: request.due)


def _request(row: dict, speed: float, block_tokens: int) -> TraceRequest:
    tokens = max(1, round(int(row["input_length"]) * block_tokens / BLOCK_TOKENS))
    steps = max(1, round(int(row["output_length"]) * block_tokens / BLOCK_TOKENS))
    blocks = tuple(int(block) for block in row["hash_ids"])
    if tokens > block_tokens * len(blocks):
        raise ValueError(f"{row['input_length']} tokens do not fit {len(blocks)} blocks")
    return TraceRequest(float(row["timestamp"]) / 1000 / speed, tokens, steps, blocks)
