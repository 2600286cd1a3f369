"""`kvstore projections push` and `list` against a server."""

import asyncio
import hashlib
from pathlib import Path

from typer.testing import CliRunner

from kvstore_server.cli import app

from ..running import serving
from .test_fitted_codecs import projection


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
