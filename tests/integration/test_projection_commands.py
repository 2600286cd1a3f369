"""`kvstore projections push` and `list` against a server."""

import asyncio
import hashlib
from pathlib import Path

import torch
from typer.testing import CliRunner

from kvstore_client import AsyncKVStoreClient
from kvstore_client.projections.export import searched_projection
from kvstore_codecs.artifact import read_projection
from kvstore_codecs.spec import CodecSpec, Projected
from kvstore_server.cli import app

from ..running import serving
from .test_fitted_codecs import SHAPE, projection, vectors


async def test_a_projection_is_pushed_and_listed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(projection())
    sha256 = hashlib.sha256(projection()).hexdigest()
    async with serving(tmp_path / "data") as server:
        target = ("--target", f"127.0.0.1:{server.port}")
        pushed = await asyncio.to_thread(CliRunner().invoke, app, ["projections", "push", str(file), *target])
        listed = await asyncio.to_thread(CliRunner().invoke, app, ["projections", "list", *target])
    assert pushed.output == f"{sha256}\n", pushed.output
    assert listed.output.startswith(sha256)
    assert f"{len(projection()):,} bytes" in listed.output


async def test_a_server_takes_a_searched_projection_and_stores_what_it_allots(tmp_path: Path) -> None:
    start = read_projection(projection())
    ranks = torch.tensor([[[10, 54], [32, 32]], [[32, 32], [54, 10]]])
    data = searched_projection(start, "projected", {0.5: ranks}, "search", {"kl": 0.5})
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        codec = Projected(share=0.5, basis=f"projection:{await client.put_projection(data)}")
        session = await client.create_session("s", SHAPE, CodecSpec(keys=codec, values=codec, mean="none"))
        k, v = vectors(100)
        await session.append(k, v)
        found, _ = await session.fetch(dtype=torch.float32)
    centred = found[0, 4:, 0] - found[0, 4:, 0].mean(0)
    assert torch.linalg.matrix_rank(centred.double(), rtol=1e-5) == 10
