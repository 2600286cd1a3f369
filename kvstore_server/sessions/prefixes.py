"""Which stored session shares the longest prefix with a chain of token-block hashes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from time import time

from kvstore_server.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument
from kvstore_server.limits import Limits
from kvstore_server.metadata.index import Index, PrefixEntry
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.session_state import AppendEntry

HASH_BYTES = 32
LOOKS_MAX = 64
"""Candidates that are compared with the store before the search ends: what a wrong index may cost."""


@dataclass(frozen=True)
class PrefixMatch:
    """Positions [0, end) of this generation, which is readable until then by those who name it."""

    session: str
    generation: str
    end: int
    valid_until_unix_seconds: float


class Prefixes:
    """Finds prefixes by the index, and answers only what the store confirms."""

    def __init__(self, registry: Registry, index: Index, limits: Limits, grace_seconds: float) -> None:
        self._registry, self._index, self._limits = registry, index, limits
        self._grace_seconds = grace_seconds

    async def match(self, tenant: str, model_fingerprint: str, hashes: Sequence[bytes]) -> PrefixMatch | None:
        """The longest match; Unavailable if the index does not answer."""
        limit = self._limits.append_block_hashes_max
        if len(hashes) > limit:
            raise InvalidArgument("block_hashes", f"{len(hashes)} are more than {limit}", limit=limit)
        if any(len(each) != HASH_BYTES for each in hashes):
            raise InvalidArgument("block_hashes", f"each must have {HASH_BYTES} bytes", limit=HASH_BYTES)
        if not hashes:
            return None
        labels = [label_of(model_fingerprint, each) for each in hashes]
        found = await self._index.find_prefixes(tenant, labels)
        looks = 0
        for label, block_hash, candidates in reversed(list(zip(labels, hashes, found, strict=True))):
            for entry in candidates:
                looks += 1
                if looks > LOOKS_MAX:
                    return None
                if await self._holds(tenant, entry, model_fingerprint, block_hash):
                    await self._index.touch(tenant, entry.session, time())
                    valid_until = time() + self._grace_seconds
                    return PrefixMatch(entry.session, entry.generation, entry.end, valid_until)
                await self._index.drop_prefix(tenant, label, entry.session)
        return None

    async def _holds(self, tenant: str, entry: PrefixEntry, model_fingerprint: str, block_hash: bytes) -> bool:
        try:
            live = await self._registry.find(tenant, entry.session)
            if live is None or (live.generation, live.state.shape.model_fingerprint) != (
                entry.generation,
                model_fingerprint,
            ):
                return False
            if live.length < entry.end:
                await self._registry.discover(live)
        except (Aborted, DataLoss, FailedPrecondition):
            return False
        return (entry.end, block_hash) in blocks_of(live.state.entries or (), max(0, entry.end - 1), entry.end)


def label_of(model_fingerprint: str, block_hash: bytes) -> str:
    """What a hash is called in the index of a tenant."""
    return sha256(f"{model_fingerprint}\n".encode() + block_hash).hexdigest()


def blocks_of(entries: Sequence[AppendEntry], start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(end, hash) of the blocks that end in positions (start, end]."""
    for entry in entries:
        if entry.start < end and entry.end > start:
            yield from ((at, block_hash) for at, block_hash in entry.blocks() if start < at <= end)


def prefix_entries(live: LiveSession, first_entry: int) -> list[tuple[str, PrefixEntry]]:
    """What the index should know of the blocks of a session's appends from number `first_entry` on."""
    entries = (live.state.entries or [])[first_entry:]
    model = live.state.shape.model_fingerprint
    return [
        (label_of(model, block_hash), PrefixEntry(session=live.state.session, generation=live.generation, end=end))
        for entry in entries
        for end, block_hash in entry.blocks()
    ]
