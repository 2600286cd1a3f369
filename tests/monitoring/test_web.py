"""The page and the metrics over HTTP, of a real server and in a real browser."""

import asyncio
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.named import shape_named
from kvstore_server.config import Address
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.monitoring.history import History
from kvstore_server.monitoring.page import POLICY, Replica, render
from kvstore_server.monitoring.web import Probes, Web
from kvstore_server.redaction import session_pseudonym
from kvstore_server.storage.local import LocalStore

from ..running import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def get(port: int, path: str) -> tuple[str, str]:
    """Content type and body."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


@contextmanager
def counting(policy: str = POLICY) -> Iterator[Web]:
    """Each answer says how many there were: `device n`."""
    numbers, registry = count(1), CollectorRegistry()
    history = History(registry)
    history.note()

    def page() -> str:
        return render(Replica("1", "a", f"device {next(numbers)}", "s", "i", 0.0), "serving", history, ())

    web = Web(Address("127.0.0.1", 0), registry, page, Probes(live=lambda: True, ready=lambda: True), policy)
    try:
        yield web
    finally:
        web.close()


async def test_a_server_answers_its_page_and_its_metrics(tmp_path: Path) -> None:
    listen = {"metrics_address": "127.0.0.1:0"}
    async with serving(tmp_path, listen=listen, sweep_seconds=0.2) as server:
        assert server.web is not None
        async with AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
            await client.create_session("book", shape_named("1x1x2x32"))
        async with asyncio.timeout(20):
            while ">book<" not in (page := await asyncio.to_thread(get, server.web.port, "/"))[1]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        metrics = await asyncio.to_thread(get, server.web.port, "/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await asyncio.to_thread(get, server.web.port, "/etc/passwd")
    assert page[0].startswith("text/html")
    assert f":{server.port}</td><td>serving</td>" in page[1]
    assert metrics[0].startswith("text/plain")
    assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="CreateSession"} 1.0' in metrics[1]


async def test_a_draining_server_is_alive_and_not_ready(tmp_path: Path) -> None:
    async with serving(tmp_path, listen={"metrics_address": "127.0.0.1:0"}) as server:
        assert server.web is not None
        for path in ("/live", "/ready"):
            assert (await asyncio.to_thread(get, server.web.port, path))[1] == "yes\n"
        server.admission.draining.set()
        assert (await asyncio.to_thread(get, server.web.port, "/live"))[1] == "yes\n"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            await asyncio.to_thread(get, server.web.port, "/ready")


async def test_the_page_of_a_server_with_tenants_tells_neither_them_nor_their_sessions(tmp_path: Path) -> None:
    key = KeyStore(LocalStore(tmp_path)).create("acme", "writer")
    sections = {"listen": {"metrics_address": "127.0.0.1:0"}, "identity": {"api_keys": True}, "sweep_seconds": 0.2}
    async with serving(tmp_path, **sections) as server:
        assert server.web is not None
        async with AsyncKVStoreClient(f"127.0.0.1:{server.port}", api_key=key) as client:
            await client.create_session("book", shape_named("1x1x2x32"))
        shown = f">{session_pseudonym('acme', 'book')}<"
        async with asyncio.timeout(20):
            while shown not in (page := await asyncio.to_thread(get, server.web.port, "/"))[1]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        metrics = await asyncio.to_thread(get, server.web.port, "/metrics")
    assert [name for name in ("acme", "book") if name in page[1] + metrics[1]] == []


def chromium(web: Web, folder: Path, *options: str) -> str:
    """What a browser prints of the page."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"),
        *(*options, f"http://127.0.0.1:{web.port}/"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_shows_the_page_and_keeps_it_up_to_date(tmp_path: Path) -> None:
    with counting() as web:
        shown = chromium(web, tmp_path, "--virtual-time-budget=6000", "--dump-dom")
    assert "Largest sessions" in shown
    assert "device 1:" not in shown
    assert 'class="stale"' not in shown


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_that_runs_no_scripts_shows_the_page(tmp_path: Path) -> None:
    with counting("sandbox") as web:
        shown = chromium(web, tmp_path, "--dump-dom")
    assert "device 1:" in shown
    assert '<noscript><meta http-equiv="refresh"' in shown
