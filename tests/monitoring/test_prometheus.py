"""A real Prometheus with the repository's settings scrapes a real server."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ..prometheus_server import PROMETHEUS, ask, prometheus
from ..running import serving
from .promql import read_by
from .test_dashboards import exercise, expressions

SCRAPED_SECONDS = 60.0


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on PATH (Debian: apt-get install prometheus)")
async def test_prometheus_scrapes_every_series_that_dashboards_and_alerts_read(tmp_path: Path) -> None:
    listen = {"metrics_address": "127.0.0.1:0"}
    wanted = {series for _, expression in expressions() for series in read_by(expression).series}
    async with serving(tmp_path / "store", listen=listen, quality={"sample_share": 1.0}, sweep_seconds=0.5) as server:
        assert server.web is not None
        with prometheus(tmp_path / "prometheus", [f"127.0.0.1:{server.web.port}"], every_seconds=1) as program:

            async def asked(path: str, **parameters: str) -> Any:
                return await asyncio.to_thread(ask, program.address, path, **parameters)

            missing = wanted
            async with asyncio.timeout(SCRAPED_SECONDS):
                while missing:
                    await exercise(f"127.0.0.1:{server.port}")
                    await asyncio.sleep(1)
                    names = await asked("/api/v1/label/__name__/values")
                    missing = wanted - set(names)
            for where, expression in expressions():
                assert await asked("/api/v1/query", query=expression) is not None, where
            up = await asked("/api/v1/query", query='sum(up{job="kvstore"})')
            alerts = await asked("/api/v1/alerts")
    assert up["result"][0]["value"][1] == "1"
    assert [alert for alert in alerts["alerts"] if alert["state"] == "firing"] == []
