"""A store and an index that note every operation on them."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from kvstore_server.metadata.index import Index
from kvstore_server.storage.store import ObjectStore

OF_THE_SERVER = {"announce", "replicas"}
"""What a server does now and then, whoever calls it."""


class Recorder:
    """`operations` has the name and the text arguments of each, save those on what no caller can name."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, ...]] = []

    def around(self, inner: object) -> Any:
        return _Recorded(inner, self)

    def store(self, inner: ObjectStore) -> ObjectStore:
        return cast(ObjectStore, self.around(inner))

    def index(self, inner: Index) -> Index:
        return cast(Index, self.around(inner))

    def note(self, name: str, arguments: tuple[object, ...]) -> None:
        texts = [each for each in arguments if isinstance(each, str)]
        if name not in OF_THE_SERVER and not any(text.startswith("_keys") for text in texts):
            self.operations.append((name, *texts))


class _Recorded:
    def __init__(self, inner: object, recorder: Recorder) -> None:
        self._inner, self._recorder = inner, recorder

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        call = cast(Callable[..., Any], value)

        @wraps(call)
        def noted(*args: object, **kwargs: object) -> Any:
            self._recorder.note(name, (*args, *kwargs.values()))
            return call(*args, **kwargs)

        return noted
