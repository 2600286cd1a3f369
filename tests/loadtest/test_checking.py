from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient, TopK
from kvstore_client.answers import FINEST, Fidelity
from kvstore_codecs.named import codec_named, shape_named

from ..running import serving

pytest.importorskip("hdrh", reason="the loadtest extra is not installed")

from kvstore_client.loadtest.checking import Expected, holds_what_was_sent, is_attention_over_what_was_sent
from kvstore_client.loadtest.vectors import Vectors, queries

SHAPE = shape_named("2x2x4x64")
OUT, LSE = torch.randn(3, 4, 64).bfloat16(), torch.randn(3, 4)
POSITIONS, LOGITS = torch.arange(24).reshape(3, 4, 2), torch.randn(3, 4, 2)
EXPECTED = Expected([(OUT, LSE)], [(POSITIONS, LOGITS)])


def top_k(positions: Tensor, logits: Tensor) -> TopK:
    return TopK(positions, logits, 24, Fidelity("raw", "", FINEST, 0.0, True))


def test_the_answer_to_another_query_is_found() -> None:
    assert EXPECTED.is_attention(0, 1, OUT[1:2], LSE[1:2])
    assert not EXPECTED.is_attention(0, 1, OUT[2:3], LSE[1:2])
    assert not EXPECTED.is_attention(0, 1, OUT[1:2], LSE[2:3])
    assert EXPECTED.is_top_k(0, 1, top_k(POSITIONS[1:2], LOGITS[1:2]))
    assert not EXPECTED.is_top_k(0, 1, top_k(POSITIONS[2:3], LOGITS[1:2]))
    assert not EXPECTED.is_top_k(0, 1, top_k(POSITIONS[1:2], LOGITS[2:3]))


def test_a_wrong_number_is_found_and_a_last_bit_is_not() -> None:
    wrong = OUT.clone()
    wrong[1, 0, 0] *= -1
    assert not EXPECTED.is_attention(0, 1, wrong[1:2], LSE[1:2])
    assert EXPECTED.is_attention(0, 1, (OUT[1:2].float() * (1 + 1 / 256)).bfloat16(), LSE[1:2])


@pytest.mark.parametrize("codec", ["raw", "rotated:1", "rotated:4", "qjl:256/affine:2"])
async def test_a_session_is_checked_against_what_was_sent(tmp_path: Path, codec: str) -> None:
    vectors, others = Vectors(SHAPE, 0, 1), Vectors(SHAPE, 1, 1)
    rows = queries(SHAPE, 0, 3)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE, codec_named(codec))
        await session.append(*vectors.between(0, 600))
        for right, sent in ((True, vectors), (False, others)):
            assert await is_attention_over_what_was_sent(session, sent, rows, 60.0) is right
            assert await holds_what_was_sent(session, sent, 600, 60.0) is right
        assert not await holds_what_was_sent(session, vectors, 599, 60.0)
