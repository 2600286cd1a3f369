"""A tenant that does nothing wrong: what it stored and what it is answered stay the same, byte for byte."""

import hashlib
from pathlib import Path
from random import Random
from typing import Any

from kvstore_proto.v1 import kvstore_pb2 as pb

from .live import Caller
from .requests import STOCK, TOKENS, append, attend, calls, create

READ = ("GetSession", "ListSessions", "Prefetch", "Score", "TopK", "Attend", "Fetch")


class Bystander:
    """Of one session of every kind."""

    def __init__(self, caller: Caller, folder: Path) -> None:
        self._caller, self._folder = caller, folder

    async def move_in(self) -> None:
        for number, kind in enumerate(STOCK):
            await self._caller.must("CreateSession", create(f"{kind}.0"))
            await self._caller.must("Append", append(f"{kind}.0", 0, 5, 70 + number))
            await self._caller.must("Append", append(f"{kind}.0", 5, TOKENS - 5, 80 + number))

    async def answers(self) -> dict[tuple[str, str], tuple[bytes, ...]]:
        found: dict[tuple[str, str], tuple[bytes, ...]] = {}
        for kind in STOCK:
            requests: dict[str, list[Any]] = calls(f"{kind}.0", Random(5), b"", [])
            requests["Attend"] = [each for each in attend(f"{kind}.0", Random(6)) if not each.HasField("cancel")]
            requests["ListSessions"] = [pb.ListSessionsRequest()]
            for method in READ:
                answers = await self._caller.must(method, requests[method])
                found[kind, method] = tuple(sorted(answers)) if method == "Attend" else answers
        return found

    def objects(self) -> dict[str, str]:
        """sha256 of every file of the tenant in the store."""
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
