"""The whole way: a model's cache through gRPC, the store and back."""

import asyncio
from pathlib import Path

import pytest
import torch

from kvstore_client import KVStoreClient
from kvstore_codecs.spec import RAW

from ..running import serving

pytest.importorskip("transformers", reason="the demo extra is not installed")

from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.integrations.transformers import StoreCache, append_prefix

from .tiny import PREFIX, assert_same, logits_in_steps, prefilled, tiny_llama, token_ids


async def test_decoding_goes_on_after_a_restart_of_the_server(tmp_path: Path) -> None:
    model, ids = tiny_llama(), token_ids(6, seed=2)
    _, local = prefilled(model, token_ids(PREFIX))
    async with serving(tmp_path) as server:
        address = f"127.0.0.1:{server.port}"
        client = await asyncio.to_thread(KVStoreClient, address)
        session = await asyncio.to_thread(client.create_session, "prefix", shape_of(model), RAW)
        assert await asyncio.to_thread(append_prefix, session, local) == PREFIX
        cache = await asyncio.to_thread(StoreCache, session, model)
        before = await asyncio.to_thread(logits_in_steps, model, cache, ids[:, :3], [2, 1])
    async with serving(tmp_path, listen={"address": address}):
        after = await asyncio.to_thread(logits_in_steps, model, cache, ids[:, 3:], [1, 2])
        await asyncio.to_thread(client.close)
    whole = logits_in_steps(model, local, ids, [6])
    assert_same(torch.cat([before, after], dim=1), whole)
