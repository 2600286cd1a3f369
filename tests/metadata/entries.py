from typing import Any

from kvstore_server.metadata.index import Census, Holdings, SessionEntry


def entry(name: str = "a", generation: int = 1, length: int = 10, **fields: Any) -> SessionEntry:
    return SessionEntry.model_validate(
        {
            "tenant": "default",
            "name": name,
            "generation": f"{generation:012d}",
            "length": length,
            "stored_bytes": 100 * length,
            "raw_bytes": 400 * length,
            "ttl_seconds": None,
            "pinned": False,
            "model_fingerprint": "model",
            "created_unix_seconds": 1000.0,
            "last_used_unix_seconds": 1000.0,
            **fields,
        }
    )


def census(**fields: Any) -> Census:
    tenants = {name: Holdings.of([entry(), entry("b", length=5)]) for name in ("default", "other")}
    made = {"taken_by": "one", "age_seconds": 2.0, "kept_seconds": 60.0, "tenants": tenants, "largest": (entry(),)}
    return Census(**{**made, **fields})
