"""Names for prefixes of token ids, the same from every engine, process and machine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Self

import numpy as np

from kvstore_client.errors import invalid

BLOCK_TOKENS = 256


@dataclass(frozen=True)
class TokenChain:
    """Chained hashes of a context's token ids: hash number i names its first (i + 1) * block_tokens tokens.

    Equal hashes mean equal tokens from position 0 on. Give it to `append`, so that the prefix can be found again, and
    to `match_prefix`. Those who share must use the same `block_tokens` and `salt`.
    """

    block_tokens: int
    hashes: tuple[bytes, ...]

    @classmethod
    def of(cls, token_ids: Iterable[int], *, block_tokens: int = BLOCK_TOKENS, salt: bytes = b"") -> Self:
        """sha256 over the hash before it and the block's ids as little-endian uint64; a last part block has none."""
        if block_tokens < 1:
            raise invalid("block_tokens", f"{block_tokens} is below 1", limit=1)
        ids = iter(token_ids)

        def hashes() -> Iterator[bytes]:
            last = sha256(f"kvstore.tokens {block_tokens}\n".encode() + salt).digest()
            while len(block := list(islice(ids, block_tokens))) == block_tokens:
                last = sha256(last + np.array(block, "<u8").tobytes()).digest()
                yield last

        return cls(block_tokens, tuple(hashes()))

    def between(self, start: int, end: int) -> tuple[bytes, ...]:
        """Of the blocks that end in positions (start, end]; InvalidArgument if the chain is shorter."""
        first, last = start // self.block_tokens, end // self.block_tokens
        if last > len(self.hashes):
            raise invalid("chain", f"names {len(self.hashes)} blocks, {last} end below position {end}", limit=last)
        return self.hashes[first:last]
