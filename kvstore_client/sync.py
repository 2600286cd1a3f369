"""The blocking client: the asynchronous one on an event loop of its own thread. No logic is repeated here."""

from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from kvstore_client.access import Tls
from kvstore_client.client import AsyncKVStoreClient
from kvstore_client.loop_thread import LoopThread
from kvstore_client.prefix import Prefix
from kvstore_client.retry import DEFAULT_RETRY, Retry
from kvstore_client.session import Session
from kvstore_client.transport import Transport
from kvstore_codecs.spec import ModelShape

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
Method = Callable[Concatenate[A, P], Coroutine[Any, Any, R]]


class _Blocking(Generic[A]):
    """An asynchronous object and the thread that runs its coroutines."""

    def __init__(self, inner: A, thread: LoopThread) -> None:
        self._inner, self._thread = inner, thread


def _blocking(method: Method[A, P, R]) -> Callable[Concatenate[_Blocking[A], P], R]:
    @wraps(method)
    def call(self: _Blocking[A], *args: P.args, **kwargs: P.kwargs) -> R:
        return self._thread.run(method(self._inner, *args, **kwargs))

    return call


def _session(method: Method[A, P, Session]) -> Callable[Concatenate[_Blocking[A], P], "SyncSession"]:
    @wraps(method)
    def call(self: _Blocking[A], *args: P.args, **kwargs: P.kwargs) -> "SyncSession":
        return SyncSession(self._thread.run(method(self._inner, *args, **kwargs)), self._thread)

    return call


class SyncPrefix(_Blocking[Prefix]):
    """Prefix with blocking calls."""

    attend = _blocking(Prefix.attend)
    attention = _blocking(Prefix.attention)
    score = _blocking(Prefix.score)
    topk = _blocking(Prefix.topk)

    @property
    def end(self) -> int:
        return self._inner.end


class SyncSession(_Blocking[Session]):
    """Session with blocking calls; threads may share it."""

    append = _blocking(Session.append)
    attend = _blocking(Session.attend)
    attention = _blocking(Session.attention)
    score = _blocking(Session.score)
    topk = _blocking(Session.topk)
    fetch = _blocking(Session.fetch)
    fetch_sketches = _blocking(Session.fetch_sketches)
    fork = _session(Session.fork)
    update = _blocking(Session.update)
    delete = _blocking(Session.delete)
    info = _blocking(Session.info)
    refresh = _blocking(Session.refresh)
    prefetch = _blocking(Session.prefetch)

    def pin(self, end: int | None = None) -> SyncPrefix:
        """As Session.pin."""
        return SyncPrefix(self._inner.pin(end), self._thread)

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def generation(self) -> str:
        return self._inner.generation

    @property
    def shape(self) -> ModelShape:
        return self._inner.shape

    @property
    def length(self) -> int:
        return self._inner.length


class KVStoreClient(_Blocking[AsyncKVStoreClient]):
    """AsyncKVStoreClient with blocking calls; threads may share it."""

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        api_key: str | None = None,
        tls: Tls | bool | None = None,
        retry: Retry = DEFAULT_RETRY,
        transport: Transport | None = None,
    ) -> None:
        inner = AsyncKVStoreClient(target, api_key=api_key, tls=tls, retry=retry, transport=transport)
        super().__init__(inner, LoopThread())

    create_session = _session(AsyncKVStoreClient.create_session)
    open_session = _session(AsyncKVStoreClient.open_session)
    list_sessions = _blocking(AsyncKVStoreClient.list_sessions)
    delete_session = _blocking(AsyncKVStoreClient.delete_session)
    match_prefix = _blocking(AsyncKVStoreClient.match_prefix)
    server_info = _blocking(AsyncKVStoreClient.server_info)
    put_projection = _blocking(AsyncKVStoreClient.put_projection)
    get_projection = _blocking(AsyncKVStoreClient.get_projection)
    list_projections = _blocking(AsyncKVStoreClient.list_projections)

    def close(self) -> None:
        """Ends the connection and the thread."""
        self._thread.run(self._inner.close())
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
