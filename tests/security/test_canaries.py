"""Secrets that a server is given or sent, and the names of tenants: in nothing that it writes or answers."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest

from kvstore_client import NO_RETRY, AsyncKVStoreClient, KVStoreError
from kvstore_codecs.spec import RAW
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.redaction import pseudonym
from kvstore_server.rpc.handlers import SERVICE
from kvstore_server.storage.local import LocalStore

from ..running import ServerProcess
from .calling import METHODS
from .one_of_each import SHAPE

TENANT = "canary-tenant"
PASSWORD = "canary-password-of-redis"
METRICS_PORT = 7909
PLANTED = "canary-secret-in-metadata"


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[str, str]:
    """A key that is good, and one that is revoked."""
    keys = KeyStore(LocalStore(tmp_path / "data"))
    good, revoked = keys.create(TENANT, "writer"), keys.create(TENANT, "writer")
    keys.revoke(revoked.split("_")[1])
    return good, revoked


@pytest.fixture
def server(tmp_path: Path, tokens: tuple[str, str]) -> Iterator[ServerProcess]:
    """Its Redis is away, so that it has something to complain about."""
    environment = {
        "KVSTORE__IDENTITY__API_KEYS": "true",
        "KVSTORE__LOG__LEVEL": "debug",
        "KVSTORE__LOG__FORMAT": "json",
        "KVSTORE__LOG__AUDIT_FILE": str(tmp_path / "audit"),
        "KVSTORE__INDEX__PASSWORD": PASSWORD,
        "KVSTORE__INDEX__URL": "redis://127.0.0.1:1/0",
        "AWS_SECRET_ACCESS_KEY": "canary-of-aws",
    }
    process = ServerProcess(tmp_path / "data", "--metrics", f"127.0.0.1:{METRICS_PORT}", env=environment)
    yield process
    if process.running:
        process.kill()


def scraped() -> str:
    with urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=10) as page:
        return page.read().decode()


async def test_no_secret_and_no_tenant_s_name_is_written_or_answered(
    tmp_path: Path, tokens: tuple[str, str], server: ServerProcess
) -> None:
    token, revoked = tokens
    answers: list[str] = []
    async with AsyncKVStoreClient(server.target, api_key=token, retry=NO_RETRY) as client:
        await client.create_session("s", SHAPE, RAW)
        await client.delete_session("s")
        calls = (client.list_sessions, lambda: client.open_session("s"), lambda: client.put_projection(b"x"))
        for call in calls:
            with pytest.raises(KVStoreError) as refused:
                await call()
            answers.append(f"{refused.value} {refused.value.facts}")
    async with grpc.aio.insecure_channel(server.target) as channel:
        for shown in (f"Bearer {revoked}", f"Bearer {token}x", f"Basic {PLANTED}", PLANTED):
            for method in METHODS:
                call = channel.stream_unary(f"/{SERVICE.full_name}/{method}")
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await call(iter([b"\xff"]), metadata=[("authorization", shown)], timeout=10)
                answers.append(f"{failed.value.details()} {failed.value.trailing_metadata()}")
    metrics = await asyncio.to_thread(scraped)
    server.terminate()
    written = {
        "log": "".join(server.lines),
        "audit": (tmp_path / "audit").read_text(),
        "metrics": metrics,
        "answers": "\n".join(answers),
    }
    secrets = [token[-43:], revoked[-43:], PASSWORD, PLANTED, "canary-of-aws"]
    assert [(where, each) for where, text in written.items() for each in [*secrets, "canary"] if each in text] == []
    assert f'kvstore_tenant_calls_total{{grpc_code="OK",tenant="{pseudonym(TENANT)}"}} 2.0' in metrics
    assert "the index does not take changes" in written["log"]
    audit = [json.loads(line) for line in written["audit"].splitlines()]
    done = [(line["who"], line["what"], line["target"], line["result"]) for line in audit if line["result"] == "OK"]
    who = f"key {token.split('_')[1]}"
    assert done == [(who, "CreateSession", "s", "OK"), (who, "DeleteSession", "s", "OK")]
    claimed = {line["who"] for line in audit if line["result"] == "UNAUTHENTICATED"}
    assert claimed >= {f"key {revoked.split('_')[1]}", "unknown"}
    assert {line["tenant"] for line in audit} == {pseudonym(TENANT), None}
    assert all(re.match("ipv4:127.0.0.1:", line["peer"]) for line in audit)
