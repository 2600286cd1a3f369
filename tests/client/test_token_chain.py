import os
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest

from kvstore_client import InvalidArgument, KVStoreError, Session, TokenChain

from .inputs import AppendLog, block
from .scripted import ScriptedServer

IDS = list(range(1000, 1100))


def test_a_hash_is_sha256_over_the_one_before_and_the_ids_of_its_block() -> None:
    first = sha256(sha256(b"kvstore.tokens 40\n").digest() + np.array(IDS[:40], "<u8").tobytes()).digest()
    second = sha256(first + np.array(IDS[40:80], "<u8").tobytes()).digest()
    assert TokenChain.of(IDS, block_tokens=40).hashes == (first, second)


def test_equal_prefixes_have_equal_hashes_and_no_others() -> None:
    chain = TokenChain.of(IDS, block_tokens=10)
    assert TokenChain.of(IDS[:57], block_tokens=10).hashes == chain.hashes[:5]
    changed = TokenChain.of([*IDS[:33], 7, *IDS[34:]], block_tokens=10)
    assert [a == b for a, b in zip(chain.hashes, changed.hashes, strict=True)] == [True] * 3 + [False] * 7
    others = [TokenChain.of(IDS, block_tokens=20), TokenChain.of(IDS, block_tokens=10, salt=b"x")]
    assert all(not set(chain.hashes) & set(other.hashes) for other in others)


def test_every_process_computes_the_same() -> None:
    program = "from kvstore_client import TokenChain; print(TokenChain.of(range(512)).hashes[-1].hex())"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert found == {TokenChain.of(range(512)).hashes[-1].hex()}


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        TokenChain.of(IDS, block_tokens=0)


async def test_an_append_carries_the_hashes_of_the_blocks_that_end_in_it(
    server: ScriptedServer, session: Session
) -> None:
    log = AppendLog(length=10)
    server.always("Append", log)
    chain = TokenChain.of(range(40), block_tokens=4)
    await session.append(*block(7), chain=chain)
    header = server.of("Append")[0].requests[0].header
    assert (header.block_tokens, tuple(header.block_hashes)) == (4, chain.hashes[2:4])
    with pytest.raises(KVStoreError) as refused:
        await session.append(*block(7), chain=TokenChain.of(range(20), block_tokens=4))
    assert refused.value.facts["field"] == "chain"
