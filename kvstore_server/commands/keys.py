"""`kvstore keys`: made, listed and revoked in the store itself, whether or not a server runs."""

import getpass
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvstore_server.identity.caller import ROLES
from kvstore_server.identity.key_store import KeyStore, StoredKey
from kvstore_server.redaction import pseudonym

DAY_SECONDS = 86_400
ConfigOption = Annotated[Path | None, typer.Option(help="The servers' YAML file of settings")]
DataOption = Annotated[str | None, typer.Option(help="The store: a local folder, or s3://bucket/path")]

keys = typer.Typer(no_args_is_help=True, help="API keys in the store, for servers with identity.api_keys.")


@keys.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose sessions the key opens")],
    role: Annotated[str, typer.Option(help="reader, writer or admin")],
    label: Annotated[str, typer.Option(help="What it is for")] = "",
    days: Annotated[float | None, typer.Option(min=0, help="Until it expires; without, never")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Make a key and print it: the only time that it can be read."""
    if role not in ROLES:
        raise typer.BadParameter(f"{role} is not reader, writer or admin")
    with _store(config, data, f"keys create for {pseudonym(tenant)} as {role}") as store:
        try:
            token = store.create(
                tenant, role, label=label, lifetime_seconds=None if days is None else days * DAY_SECONDS
            )
        except ValueError:
            raise typer.BadParameter("tenant or label is not allowed") from None
    print(token)


@keys.command("list")
def list_keys(config: ConfigOption = None, data: DataOption = None) -> None:
    """Every key: whose, which role, until when."""
    table = Table()
    for name in ("id", "tenant", "in logs", "role", "expires", "state", "label"):
        table.add_column(name, overflow="fold", no_wrap=name == "id")
    with _store(config, data) as store:
        for key in store.all().values():
            table.add_row(key.id, *_facts(key))
    Console().print(table)


@keys.command()
def revoke(key_id: str, config: ConfigOption = None, data: DataOption = None) -> None:
    """End a key: servers refuse it within five seconds."""
    with _store(config, data, "keys revoke", key_id) as store:
        was_good = store.revoke(key_id)
    print("revoked" if was_good else "was revoked already")


def _facts(key: StoredKey) -> tuple[str, ...]:
    record = key.record
    if record is None:
        return "", "", "", "", "unreadable", ""
    state = "revoked" if key.revoked else "expired" if record.expired(time.time()) else "good"
    expires = record.expires_unix_seconds
    until = "never" if expires is None else datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%d")
    return record.tenant, pseudonym(record.tenant), record.role, until, state, record.label


@contextmanager
def _store(config: Path | None, data: str | None, what: str = "", target: str = "") -> Iterator[KeyStore]:
    """The keys of the store that the settings name. What is done to them is noted in the audit log, if there is one."""
    from kvstore_server.audit import AuditLog
    from kvstore_server.config import ConfigError, load
    from kvstore_server.errors import KVStoreError
    from kvstore_server.redaction import Redactor
    from kvstore_server.storage.opening import open_store

    try:
        settings = load(config, {} if data is None else {"storage": {"url": data}})
        audit = AuditLog(settings.log.audit_file if what else None, Redactor())
        store = KeyStore(open_store(settings.storage))
    except (ConfigError, KVStoreError, OSError) as error:
        Console(stderr=True).print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None
    result = "INTERNAL"
    try:
        yield store
        result = "OK"
    except typer.BadParameter:
        result = "INVALID_ARGUMENT"
        raise
    except KVStoreError as error:
        result = error.code
        Console(stderr=True).print(f"[red]{error.code}[/]: {error}", highlight=False)
        raise typer.Exit(1) from None
    finally:
        audit.record(who=f"operator {getpass.getuser()}", tenant="", what=what, target=target, result=result)
        audit.close()
