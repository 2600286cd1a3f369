"""The calculator beside what a store really keeps."""

from pathlib import Path

import pytest
import torch

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.named import codec_named, shape_named
from kvstore_codecs.size import DEFAULT_CODECS, bytes_per_token, session_bytes
from kvstore_server.commands.size import parse_bytes

from ..running import serving

SHAPE = shape_named("2x2x4x64")
TOKENS = 4096


async def test_sessions_take_what_the_calculator_says(tmp_path: Path) -> None:
    k, v = torch.randn(2, 2, TOKENS, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        for number, text in enumerate(("raw", "rotated:3", "qjl:256/affine:4")):
            session = await client.create_session(f"s{number}", SHAPE, codec_named(text))
            await session.append(k, v)
            stored = (await session.info()).stored_bytes
            assert session_bytes(codec_named(text), SHAPE, TOKENS) == pytest.approx(stored, rel=0.02), text


def test_every_codec_of_the_table_has_a_size() -> None:
    sizes = {text: bytes_per_token(codec_named(text), SHAPE) for text in DEFAULT_CODECS}
    assert sizes["raw"] == SHAPE.raw_bytes_per_token == max(sizes.values())
    assert sizes["projected:0.5"] == pytest.approx(sizes["raw"] / 2)
    assert sizes["rotated:2"] < sizes["rotated:3"] < sizes["rotated:4"]


def test_a_codec_whose_size_is_in_a_file_is_refused() -> None:
    text = '{"keys": {"name": "matryoshka", "basis": "projection:%s"}, "values": {"name": "raw"}}' % ("0" * 64)
    with pytest.raises(ValueError, match="depends on its file"):
        bytes_per_token(codec_named(text), SHAPE)


def test_memory_sizes_are_read() -> None:
    assert (parse_bytes("64GiB"), parse_bytes("3 MiB")) == (64 << 30, 3 << 20)
    for text in ("64", "GiB", "1.5GiB", "64GB"):
        with pytest.raises(ValueError, match="is not a size such as 64GiB"):
            parse_bytes(text)
