"""API keys: `kvs_{id}_{secret}`, of which the store holds a record and no secret (docs/format.md, section 8)."""

import hmac
import json
import re
import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvstore_server.identity.caller import Role
from kvstore_server.limits import Name

RECORD_BYTES_MAX = 4_096
TOKEN = re.compile(r"kvs_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
"""Of 64 random bits that name the key and 256 that nobody else knows."""


class KeyRecord(BaseModel):
    """What is known of one key. `verifier` is HMAC-SHA256, keyed by the secret, over all the other fields.

    So a record that was changed, by a failing disk or by hand, fits no key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal["kvstore.key"] = "kvstore.key"
    min_reader: Literal[1] = 1
    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    tenant: Name
    role: Role
    label: Annotated[str, Field(max_length=128)]
    created_unix_seconds: float
    expires_unix_seconds: float | None
    verifier: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""

    def fits(self, secret: str) -> bool:
        """Whether the key with this secret made the record; takes as long whether or not it did."""
        return hmac.compare_digest(_verifier(self, secret), self.verifier)

    def expired(self, unix_seconds: float) -> bool:
        return self.expires_unix_seconds is not None and unix_seconds >= self.expires_unix_seconds


def make_key(
    tenant: str, role: Role, *, label: str, created_unix_seconds: float, expires_unix_seconds: float | None
) -> tuple[str, KeyRecord]:
    """A new key, to be shown once, and its record. ValueError for a tenant or label that is not allowed."""
    secret = secrets.token_urlsafe(32)
    record = KeyRecord(
        id=secrets.token_hex(8),
        tenant=tenant,
        role=role,
        label=label,
        created_unix_seconds=created_unix_seconds,
        expires_unix_seconds=expires_unix_seconds,
    )
    record = record.model_copy(update={"verifier": _verifier(record, secret)})
    return f"kvs_{record.id}_{secret}", record


def parse_key(token: str) -> tuple[str, str] | None:
    """(id, secret), or None if that is no key."""
    match = TOKEN.fullmatch(token)
    return None if match is None else (match[1], match[2])


def write_key_record(record: KeyRecord) -> bytes:
    return _canonical(record.model_dump(mode="json"))


def read_key_record(data: bytes | memoryview, key_id: str) -> KeyRecord:
    """ValueError if the bytes are not the record of that key."""
    if len(data) > RECORD_BYTES_MAX:
        raise ValueError(f"{len(data)} bytes are no key record")
    record = KeyRecord.model_validate_json(bytes(data))
    if record.id != key_id:
        raise ValueError("the record of another key")
    return record


def _verifier(record: KeyRecord, secret: str) -> str:
    facts = record.model_dump(mode="json", exclude={"verifier"})
    return hmac.digest(secret.encode(), _canonical(facts), "sha256").hex()


def _canonical(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
