"""One fuzzed call: made from a seed and a number, kept as a file, played again from it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvstore_proto.v1 import kvstore_pb2 as pb

from .mutations import changed_bytes, changed_message, changed_stream
from .requests import STOCK, calls

SESSIONS_OF_A_KIND = 4


@dataclass(frozen=True)
class Case:
    """`messages` as they go out; with `cancel_after` the caller walks away when it has sent so many."""

    number: int
    method: str
    what: str
    messages: tuple[bytes, ...]
    cancel_after: int | None = None

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.number:05d}-{self.method}.json"
        path.write_text(json.dumps({**vars(self), "messages": [each.hex() for each in self.messages]}))
        return path

    @classmethod
    def load(cls, path: Path) -> "Case":
        fields = json.loads(path.read_text())
        return cls(**{**fields, "messages": tuple(map(bytes.fromhex, fields["messages"]))})


def stocked() -> list[str]:
    """The sessions that cases are about."""
    return [f"{kind}.{number}" for kind in STOCK for number in range(SESSIONS_OF_A_KIND)]


class Generator:
    """The same seed makes the same cases, in any order."""

    def __init__(self, seed: int, methods: Sequence[str], projection: bytes, sketch: Sequence[pb.FetchResponse]):
        self._seed, self._methods = seed, methods
        self._projection, self._sketch = projection, sketch

    def case(self, number: int) -> Case:
        chance = Random(f"{self._seed} {number}")
        method = self._methods[number % len(self._methods)]
        valid = calls(chance.choice(stocked()), chance, self._projection, self._sketch)
        requests = valid[method]
        what = chance.choices(["valid", "fields", "bytes", "stream"], [10, 45, 25, 20])[0]
        at = chance.randrange(len(requests))
        if what == "fields":
            requests = [*requests[:at], changed_message(requests[at], chance), *requests[at + 1 :]]
        messages = [each.SerializeToString() for each in requests]
        if what == "bytes":
            messages[at] = changed_bytes(messages[at], chance)
        elif what == "stream":
            strangers = [each[0].SerializeToString() for each in valid.values()]
            messages = changed_stream(messages, strangers, chance)
        cancel = chance.randint(0, len(messages)) if what == "stream" and chance.random() < 0.2 else None
        return Case(number, method, what, tuple(messages), cancel)
