"""The object store contract in a dictionary."""

from collections.abc import Sequence

from kvstore_server.storage.store import Buffer


class MemoryStore:
    """Counts its calls by name in `calls`."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = {} if objects is None else objects
        self.calls: list[str] = []

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        self.calls.append("put_if_absent")
        if key in self.objects:
            return False
        self.objects[key] = b"".join(parts)
        return True

    def get(self, key: str) -> bytes:
        self.calls.append("get")
        return self.objects[key]

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self.calls.append("get_range")
        return self.objects[key][start:end]

    def list_keys(self, prefix: str, start_after: str = "") -> list[str]:
        self.calls.append("list_keys")
        return sorted(key for key in self.objects if key.startswith(prefix + "/" * bool(prefix)) and key > start_after)

    def list_folders(self, prefix: str) -> list[str]:
        self.calls.append("list_folders")
        depth = len(prefix.split("/")) if prefix else 0
        paths = (key.split("/") for key in self.list_keys(prefix))
        return sorted({path[depth] for path in paths if len(path) > depth + 1})

    def size(self, key: str) -> int:
        self.calls.append("size")
        return len(self.objects[key])

    def delete(self, key: str) -> None:
        self.calls.append("delete")
        self.objects.pop(key, None)

    def probe(self) -> None:
        return
