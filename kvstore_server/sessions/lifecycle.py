"""Create, get, list, update, delete and fork: facts go to the meta log first, then to the index."""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import ParamSpec

from kvstore_codecs.resolve import check_spec
from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_server.errors import InvalidArgument, OutOfRange
from kvstore_server.limits import Limits
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.model import SessionInfo
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.keys import check_name
from kvstore_server.storage.session_state import SessionState

P = ParamSpec("P")

TTL_SECONDS_MAX = 10 * 365 * 86_400.0


class Lifecycle:
    """The unary session calls. All are idempotent: the same call again says `already_present` or does nothing."""

    def __init__(
        self,
        registry: Registry,
        projecting: Projecting,
        indexing: Indexing,
        quotas: Quotas,
        limits: Limits,
        default_codec: CodecSpec,
    ) -> None:
        self._registry, self._projecting, self._indexing = registry, projecting, indexing
        self._quotas, self._limits = quotas, limits
        self._default_codec = default_codec

    async def create(
        self,
        tenant: str,
        name: str,
        shape: ModelShape,
        spec: CodecSpec | None,
        ttl_seconds: float | None,
        pinned: bool,
    ) -> tuple[SessionInfo, bool]:
        """A new empty session, or the equal one that is there (True); AlreadyExists if that differs."""
        check_name("name", name)
        check_ttl(ttl_seconds)
        self._check_shape(shape)
        spec = spec or self._default_codec
        try:
            check_spec(spec, shape)
        except ValueError as error:
            raise InvalidArgument("codec_json", str(error)) from None
        await self._projecting.of(spec, shape)
        await self._check_quota(tenant, name)
        log = self._registry.log(tenant)
        return await self._made(log.create, name, shape, spec, ttl_seconds=ttl_seconds, pinned=pinned)

    async def get(self, tenant: str, name: str) -> SessionInfo:
        check_name("name", name)
        return (await self._registry.open_now(tenant, name, None)).info()

    async def page(self, tenant: str, prefix: str, page_size: int, page_token: str) -> tuple[list[SessionInfo], str]:
        """Sessions in order of their names from `page_token` on, and the next token, empty at the end."""
        if page_size > self._limits.list_page_max:
            limit = self._limits.list_page_max
            raise InvalidArgument("page_size", f"{page_size} is more than {limit}", limit=limit)
        if len(prefix) > 128 or len(page_token) > 128:
            raise InvalidArgument("prefix", "prefix and page_token have at most 128 characters", limit=128)
        size = page_size or self._limits.list_page_max
        names = await self._indexing.names(tenant, prefix, size, page_token)
        infos = [live.info() for name in names if (live := await self._registry.find(tenant, name)) is not None]
        return infos, names[-1] if len(names) == size else ""

    async def update(
        self,
        tenant: str,
        name: str,
        generation: str,
        ttl_seconds: float | None,
        clear_ttl: bool,
        pinned: bool | None,
    ) -> SessionInfo:
        """Sets what is given and leaves the rest."""
        check_name("name", name)
        check_ttl(ttl_seconds)
        live = await self._registry.open_now(tenant, name, generation or None)
        log = self._registry.log(tenant)
        keep = None if clear_ttl else live.state.ttl_seconds
        ttl = keep if ttl_seconds is None else ttl_seconds
        pin = live.state.pinned if pinned is None else pinned
        await asyncio.to_thread(log.update, live.state, ttl_seconds=ttl, pinned=pin)
        self._indexing.changed(live)
        return live.info()

    async def delete(self, tenant: str, name: str, generation: str | None) -> bool:
        """True if something was deleted; forks keep what they share."""
        check_name("name", name)
        log = self._registry.log(tenant)
        deleted = await asyncio.to_thread(log.delete, name, generation)
        if deleted is not None:
            self._registry.forget(tenant, name)
            self._indexing.removed(tenant, name, deleted)
        return deleted is not None

    async def fork(
        self,
        tenant: str,
        source: str,
        source_generation: str | None,
        end: int | None,
        name: str,
        ttl_seconds: float | None,
        pinned: bool,
    ) -> tuple[SessionInfo, bool]:
        """A session that shares [0, end) of `source` and goes its own way from there."""
        check_name("source", source)
        check_name("name", name)
        check_ttl(ttl_seconds)
        live = await self._registry.open_now(tenant, source, source_generation)
        end = live.length if end is None else end
        if end > live.length:
            raise OutOfRange("BEYOND_LENGTH", f"end {end} is beyond the length {live.length}", length=live.length)
        await self._check_quota(tenant, name)
        log = self._registry.log(tenant)
        return await self._made(log.fork, live.state, end, name, ttl_seconds=ttl_seconds, pinned=pinned)

    async def _check_quota(self, tenant: str, name: str) -> None:
        """What is there already may be created again."""
        refusal = self._quotas.session_refusal(tenant)
        if refusal is not None and await self._registry.find(tenant, name) is None:
            raise refusal

    async def _made(
        self, make: Callable[P, tuple[SessionState, bool]], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[SessionInfo, bool]:
        """The session that `make` makes or finds, open and in the index. One that is open keeps its rows."""
        now = monotonic()
        state, present = await asyncio.to_thread(make, *args, **kwargs)
        if present:
            live = await self._registry.open_now(state.tenant, state.session, None)
        else:
            live = await self._registry.adopt(state, now)
        entry = self._indexing.changed(live)
        if not present:
            self._quotas.created(entry)
        return live.info(), present

    def _check_shape(self, shape: ModelShape) -> None:
        limits = self._limits
        for field, value, limit in (
            ("layers", shape.layers, limits.layers_max),
            ("kv_heads", shape.kv_heads, limits.kv_heads_max),
            ("query_heads", shape.query_heads, limits.query_heads_max),
        ):
            if value > limit:
                raise InvalidArgument(f"shape.{field}", f"{value} is more than {limit}", limit=limit)


def check_ttl(ttl_seconds: float | None) -> None:
    if ttl_seconds is not None and not 0 < ttl_seconds <= TTL_SECONDS_MAX:
        raise InvalidArgument("ttl_seconds", f"must be above 0 and at most {TTL_SECONDS_MAX:.0f}")
