from pathlib import Path

import pytest

from kvstore_client import AsyncKVStoreClient, Tls
from kvstore_client.access import access_to

from . import inputs
from .scripted import ScriptedServer

KEY = "kvs_0123456789abcdef_canary"


@pytest.fixture(autouse=True)
def _no_access_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "TLS", "TLS_CA_FILE", "TLS_CERTIFICATE_FILE", "TLS_KEY_FILE", "TLS_SERVER_NAME"):
        monkeypatch.delenv(f"KVSTORE_{name}", raising=False)


def test_nothing_is_shown_and_nothing_encrypted_unless_that_is_asked() -> None:
    access = access_to("store.example:7700")
    assert (access.metadata, access.tls) == ((), None)


def test_the_environment_says_what_the_arguments_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_API_KEY", KEY)
    monkeypatch.setenv("KVSTORE_TLS_CA_FILE", "/ca.pem")
    monkeypatch.setenv("KVSTORE_TLS_SERVER_NAME", "store")
    access = access_to("10.0.0.1:7700")
    assert access.metadata == (("authorization", f"Bearer {KEY}"),)
    assert access.tls == Tls(ca_file="/ca.pem", server_name="store")
    given = access_to("10.0.0.1:7700", "kvs_other", Tls(Path("/other.pem")))
    assert (given.api_key, given.tls) == ("kvs_other", Tls(Path("/other.pem")))


@pytest.mark.parametrize(("value", "tls"), [("on", Tls()), ("1", Tls()), ("off", None), ("0", None)])
def test_tls_is_switched_by_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, tls: Tls | None) -> None:
    monkeypatch.setenv("KVSTORE_TLS", value)
    assert access_to("store.example:7700", KEY).tls == tls


def test_a_switch_that_says_nothing_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_TLS", "maybe")
    with pytest.raises(ValueError, match="KVSTORE_TLS: 'maybe'"):
        access_to("localhost:7700")


FAR = """
    store.example:7700 dns:///store.example:7700 10.0.0.1:7700 0.0.0.0:7700 [2001:db8::1]:7700 localhost.example:7700
    ipv4:10.0.0.1:7700 ipv4:127.0.0.1:1,10.0.0.1:1 dns://127.0.0.1/far:7700
"""


@pytest.mark.parametrize("target", FAR.split())
def test_a_key_does_not_travel_unencrypted_unless_that_is_said(target: str) -> None:
    with pytest.raises(ValueError, match="unencrypted") as refused:
        access_to(target, KEY)
    assert "canary" not in str(refused.value)
    assert access_to(target, KEY, False).tls is None
    assert access_to(target, KEY, True).tls == Tls()


@pytest.mark.parametrize(
    "target",
    ["localhost:7700", "127.0.0.1:7700", "127.0.0.9", "[::1]:7700", "unix:/run/kv.sock", "dns:///localhost:7700"],
)
def test_a_key_may_go_unencrypted_to_this_machine(target: str) -> None:
    assert access_to(target, KEY).tls is None


@pytest.mark.parametrize("key", ["a b", "a\n", "é", "canary\0"])
def test_a_key_that_is_no_text_for_a_header_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="api_key: holds characters") as refused:
        access_to("localhost:1", key)
    assert key not in str(refused.value)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="only used together"):
        Tls(certificate_file="/client.crt")


def test_the_key_is_in_no_text_about_the_access() -> None:
    assert "canary" not in repr(access_to("localhost:1", KEY))


async def test_every_call_shows_the_key(server: ScriptedServer) -> None:
    server.always("GetServerInfo", inputs.server_info())
    async with AsyncKVStoreClient(server.target, api_key=KEY) as client:
        await client.server_info()
    assert server.calls[0].metadata["authorization"] == f"Bearer {KEY}"
