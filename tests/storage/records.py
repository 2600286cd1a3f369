"""Meta records that this version does not write."""

import json
from typing import Any

from crc32c import crc32c

from kvstore_server.storage.meta import Delete

from .inputs import CLOCK_SECONDS, TENANT

DELETE = Delete(
    tenant=TENANT, session="name", seq=3, writer="a1", created_unix_seconds=CLOCK_SECONDS, generation="000000000001"
)


def signed(**fields: Any) -> bytes:
    """A delete record with other fields and a right checksum."""
    fields = {**DELETE.model_dump(mode="json"), **fields}
    return _text({**fields, "crc32c": crc32c(_text(fields))})


def of_newer_version(session: str, seq: int) -> bytes:
    return signed(session=session, seq=seq, type="future", version=9, min_reader=9)


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
