"""A real Prometheus with the repository's settings scrapes a real server."""

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..running import serving
from .promql import read_by
from .test_dashboards import DEPLOY, exercise, expressions

PROMETHEUS = shutil.which("prometheus")
START_SECONDS, SCRAPED_SECONDS = 60.0, 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, path: str, **parameters: str) -> Any:
    """The data of one answer of Prometheus; None while it does not answer."""
    url = f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]
    except (urllib.error.URLError, ConnectionError):
        return None


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[int]:
    """With the repository's rules and settings, except that it is told where the server is; its port."""
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["scrape_configs"][0].pop("dns_sd_configs")
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    port = free_port()
    assert PROMETHEUS is not None
    command = [
        *(PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
    ]
    process = subprocess.Popen(command, cwd=folder)  # noqa: ASYNC220
    try:
        async with asyncio.timeout(START_SECONDS):
            while await asyncio.to_thread(ask, port, "/api/v1/rules") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on PATH (Debian: apt-get install prometheus)")
async def test_prometheus_scrapes_every_series_that_dashboards_and_alerts_read(tmp_path: Path) -> None:
    listen = {"metrics_address": "127.0.0.1:0"}
    data, folder = tmp_path / "store", tmp_path / "prometheus"
    folder.mkdir()
    wanted = {series for _, expression in expressions() for series in read_by(expression).series}
    async with serving(data, listen=listen, quality={"sample_share": 1.0}, sweep_seconds=0.5) as server:
        assert server.web is not None
        async with prometheus(folder, f"127.0.0.1:{server.web.port}") as port:
            missing = wanted
            async with asyncio.timeout(SCRAPED_SECONDS):
                while missing:
                    await exercise(f"127.0.0.1:{server.port}")
                    await asyncio.sleep(1)
                    names = await asyncio.to_thread(ask, port, "/api/v1/label/__name__/values")
                    missing = wanted - set(names)
            for where, expression in expressions():
                assert await asyncio.to_thread(ask, port, "/api/v1/query", query=expression) is not None, where
            up = await asyncio.to_thread(ask, port, "/api/v1/query", query='sum(up{job="kvstore"})')
            alerts = await asyncio.to_thread(ask, port, "/api/v1/alerts")
    assert up["result"][0]["value"][1] == "1"
    assert [alert for alert in alerts["alerts"] if alert["state"] == "firing"] == []
