"""Encrypted connections: versions, certificates of clients, and new files without a restart."""

import asyncio
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from kvstore_client import NO_RETRY, AsyncKVStoreClient, Tls, Unauthenticated, Unavailable
from kvstore_server.app import Server
from kvstore_server.config import ConfigError
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.rpc.probe import is_serving
from kvstore_server.storage.local import LocalStore

from ..certificates import Authority
from ..running import serving

NAME = "spiffe://test/worker"
SECTIONS = {
    "listen": {"mtls_address": "127.0.0.1:0"},
    "identity": {"api_keys": True, "certificates": {NAME: {"tenant": "acme", "role": "writer"}}},
}


def client_of(port: int, tls: Tls, api_key: str | None = None) -> AsyncKVStoreClient:
    return AsyncKVStoreClient(f"localhost:{port}", tls=tls, api_key=api_key, retry=NO_RETRY)


def certificate_of(server: Server, authority: Authority) -> bytes:
    context = ssl.create_default_context(cafile=str(authority.file))
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True) or b""


async def test_only_certificates_of_the_authority_come_in(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "other")
    late = authority.issue("late", NAME, expired=True)
    async with serving(tmp_path / "data", tls=authority.server_section(), **SECTIONS) as server:
        async with client_of(server.mtls_port, authority.client("worker", NAME)) as client:
            assert await client.list_sessions() == []
        ca = authority.file
        for tls in (Tls(ca), Tls(ca, *stranger.issue("stranger", NAME)), Tls(ca, *late), Tls(stranger.file)):
            async with client_of(server.mtls_port, tls) as client:
                with pytest.raises(Unavailable):
                    await client.list_sessions(timeout=3)
        async with client_of(server.port, authority.client("worker", NAME)) as client:
            with pytest.raises(Unauthenticated):  # the server does not ask for one there
                await client.list_sessions()


async def test_a_certificate_does_not_help_where_its_name_is_of_another_kind(tmp_path: Path) -> None:
    """An address in a certificate that looks like a DNS name in the settings."""
    authority = Authority(tmp_path)
    sections = {**SECTIONS, "identity": {"certificates": {"127.0.0.9": {"tenant": "acme", "role": "writer"}}}}
    async with (
        serving(tmp_path / "data", tls=authority.server_section(), **sections) as server,
        client_of(server.mtls_port, authority.client("worker", "127.0.0.9")) as client,
    ):
        with pytest.raises(Unauthenticated):
            await client.list_sessions()


async def test_new_certificates_are_taken_up_without_a_restart_and_wrong_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    async with serving(tmp_path / "data", tls=authority.server_section(), **SECTIONS) as server:
        first = await asyncio.to_thread(certificate_of, server, authority)
        authority.issue("server")
        second = await asyncio.to_thread(certificate_of, server, authority)
        assert second != first
        key = tmp_path / "server.key"
        key.write_bytes(authority.issue("unrelated")[1].read_bytes())
        assert await asyncio.to_thread(certificate_of, server, authority) == second
        key.unlink()
        assert await asyncio.to_thread(certificate_of, server, authority) == second
        assert "cannot be used" in caplog.text
        assert "PRIVATE" not in caplog.text
        authority.issue("server")
        assert await asyncio.to_thread(certificate_of, server, authority) not in (first, second)


async def test_an_open_connection_outlives_new_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    token = KeyStore(LocalStore(tmp_path / "data")).create("acme", "reader")
    async with (
        serving(tmp_path / "data", tls=authority.server_section(), **SECTIONS) as server,
        client_of(server.port, authority.client(), token) as client,
    ):
        await client.list_sessions()
        authority.issue("server")
        await client.list_sessions()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
async def test_tls_older_than_1_2_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)

    def old() -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(authority.file))
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        return context

    def refused(port: int) -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            try:
                old().wrap_socket(raw, server_hostname="localhost").close()
            except (ssl.SSLError, ConnectionError):
                return True
        return False

    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(*authority.issue("old"))
    accepting.minimum_version = ssl.TLSVersion.TLSv1_1
    accepting.set_ciphers("DEFAULT:@SECLEVEL=0")

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()

    lax = await asyncio.start_server(close, "127.0.0.1", 0, ssl=accepting)
    async with lax, serving(tmp_path / "data", tls=authority.server_section(), **SECTIONS) as server:
        assert await asyncio.to_thread(refused, server.port)
        assert await asyncio.to_thread(refused, server.mtls_port)
        assert not await asyncio.to_thread(refused, lax.sockets[0].getsockname()[1]), "this client speaks no TLS 1.1"


async def test_a_probe_needs_no_identity(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with serving(tmp_path / "data", tls=authority.server_section(), **SECTIONS) as server:
        ca = authority.file.read_bytes()
        assert await asyncio.to_thread(is_serving, f"127.0.0.1:{server.port}", 5, ca, "localhost")
        assert not await asyncio.to_thread(is_serving, f"127.0.0.1:{server.port}", 1)


async def test_files_that_cannot_be_used_stop_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    section = authority.server_section() | {"key_file": authority.issue("unrelated")[1]}
    with pytest.raises(ConfigError, match="tls: a certificate or key"):
        async with serving(tmp_path / "data", tls=section, **SECTIONS):
            pass
