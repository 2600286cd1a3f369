from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvstore_server.commands.keys import keys
from kvstore_server.identity.key_ring import KeyRing
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.storage.local import LocalStore


def run(*arguments: str) -> Result:
    return CliRunner().invoke(keys, arguments)


def caller_of(folder: Path, token: str) -> object:
    ring = KeyRing(KeyStore(LocalStore(folder)))
    ring.refresh()
    return ring.caller_of(token)


def test_a_key_is_shown_once_then_listed_then_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE__LOG__AUDIT_FILE", str(tmp_path / "audit"))
    store = ("--data", str(tmp_path / "data"))
    token = run("create", "--tenant", "acme", "--role", "writer", "--label", "w1", "--days", "1", *store).output.strip()
    key_id, secret = token.split("_")[1], token[-43:]
    assert caller_of(tmp_path / "data", token)
    listed = run("list", *store).output
    assert all(text in listed for text in (key_id, "acme", "writer", "good"))
    assert secret not in listed
    assert run("revoke", key_id, *store).output == "revoked\n"
    assert run("revoke", key_id, *store).output == "was revoked already\n"
    assert caller_of(tmp_path / "data", token) is None
    assert "revoked" in run("list", *store).output
    audit = (tmp_path / "audit").read_text()
    assert audit.count("\n") == 3
    assert secret not in audit


def test_what_is_not_allowed_or_not_there_is_refused(tmp_path: Path) -> None:
    store = ("--data", str(tmp_path))
    assert run("create", "--tenant", "../x", "--role", "writer", *store).exit_code == 2
    assert run("create", "--tenant", "acme", "--role", "root", *store).exit_code == 2
    assert run("revoke", "0" * 16, *store).exit_code == 1
