"""The store that the settings name."""

from kvstore_server.config import ConfigError, Storage
from kvstore_server.storage.local import LocalStore
from kvstore_server.storage.store import ObjectStore


def open_store(settings: Storage) -> ObjectStore:
    """A local folder or a bucket; nothing is proved yet. ConfigError if what it needs is not installed."""
    if settings.kind == "local":
        return LocalStore(settings.folder)
    try:
        from kvstore_server.storage.bucket import BucketStore
    except ImportError as error:
        raise ConfigError(
            f"storage.url: {settings.url} needs the extra `s3` (pip install remote-kv-store[s3])"
        ) from error
    return BucketStore(
        settings.url,
        endpoint=settings.endpoint,
        region=settings.region,
        request_seconds=settings.request_seconds,
        retry_seconds=settings.retry_seconds,
    )
