"""Projections in the store: immutable files named by their sha256, for all tenants."""

import re
from collections import OrderedDict
from threading import Lock

from kvstore_codecs.artifact import HEADER_BYTES_MAX, Projection, ProjectionHeader, read_header, read_projection
from kvstore_server.errors import DataLoss, NotFound
from kvstore_server.storage.store import Buffer, ObjectStore

FOLDER = "_projections"
CACHED_MAX = 4
_NAME = re.compile(rf"{FOLDER}/([0-9a-f]{{64}})\.safetensors", re.ASCII)


class ProjectionStore:
    """Blocking. What was read last is kept: sessions of one model share a projection."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._cached: OrderedDict[str, Projection] = OrderedDict()
        self._lock = Lock()

    def put(self, data: Buffer) -> tuple[Projection, bool]:
        """Keeps the file, and whether it was there; ValueError if it is no projection."""
        projection = read_projection(data)
        won = self._store.put_if_absent(_key(projection.sha256), [data])
        return projection, not won

    def get(self, sha256: str) -> bytes | memoryview:
        """The file; NotFound."""
        try:
            return self._store.get(_key(sha256))
        except KeyError:
            raise NotFound("PROJECTION_NOT_FOUND", f"there is no projection {sha256}", sha256=sha256) from None

    def load(self, sha256: str) -> Projection:
        """NotFound; DataLoss if the file is not what its name says."""
        with self._lock:
            if sha256 not in self._cached:
                try:
                    self._cached[sha256] = read_projection(self.get(sha256), sha256)
                except ValueError as error:
                    text = f"projection {sha256} is damaged"
                    raise DataLoss("PROJECTION_DAMAGED", text, sha256=sha256) from error
            self._cached.move_to_end(sha256)
            if len(self._cached) > CACHED_MAX:
                self._cached.popitem(last=False)
            return self._cached[sha256]

    def header(self, sha256: str) -> ProjectionHeader | None:
        """From the file's beginning alone, not compared with its name; None if it is damaged. KeyError."""
        head = self._store.get_range(_key(sha256), 0, HEADER_BYTES_MAX)
        try:
            return read_header(memoryview(head))[0]
        except ValueError:
            return None

    def size(self, sha256: str) -> int:
        return self._store.size(_key(sha256))

    def names(self, start_after: str = "", count: int | None = None) -> list[str]:
        """The first `count` hashes after this one, sorted; all without a count."""
        keys = self._store.list_keys(FOLDER, _key(start_after) if start_after else "")
        matches = (_NAME.fullmatch(key) for key in keys)
        return [match[1] for match in matches if match][:count]


def _key(sha256: str) -> str:
    return f"{FOLDER}/{sha256}.safetensors"
