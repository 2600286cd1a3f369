"""Score, TopK and Attend: checked against the session, computed on the device thread over one prefix."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TypeAlias

import torch

from kvstore_kernels.host import HostArray
from kvstore_server.errors import InvalidArgument
from kvstore_server.limits import Limits
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.scheduling.completion import Later, Promise, Told
from kvstore_server.scheduling.engine import Engine, Work
from kvstore_server.sessions import attention
from kvstore_server.sessions.attention import Device
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.model import (
    AttendAnswer,
    Fidelity,
    Precision,
    Query,
    ScoreAnswer,
    SessionInfo,
    TopKAnswer,
)
from kvstore_server.sessions.quality import Quality
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.keys import check_name
from kvstore_server.storage.meta import Floor

Tell: TypeAlias = Callable[[AttendAnswer | None, BaseException | None], None]
SCORE_TOKENS = 65_536


@dataclass(frozen=True)
class Prefetched:
    generation: str
    length: int
    resident_bytes: int


@dataclass(frozen=True)
class Prepared:
    """A query of attention that was checked and can be asked again and again, with other numbers in q.

    It keeps no rows in memory.
    """

    query: Query
    live: weakref.ref[LiveSession]
    resident: weakref.ref[ResidentSession]
    precision: Precision
    """That it is read at."""
    floor: Floor
    debias: float
    heads: slice
    repeats: bool
    key: Hashable
    """Of what one pass answers."""


def check_layer(resident: ResidentSession, layer: int) -> None:
    """InvalidArgument unless the session has it."""
    if layer >= resident.shape.layers:
        limit = resident.shape.layers
        raise InvalidArgument("layer", f"{layer} is outside [0, {limit})", limit=limit)


class Querying:
    """Answers from the rows of one session; each names the prefix, the level and the error it was computed with."""

    def __init__(self, registry: Registry, engine: Engine, device: Device, limits: Limits, quality: Quality) -> None:
        self._registry, self._engine, self._device, self._limits = registry, engine, device, limits
        self._quality = quality

    async def bind(self, tenant: str, session: str, generation: str | None) -> SessionInfo:
        """The session an Attend handle stands for."""
        check_name("bind.session", session)
        return (await self._registry.open(tenant, session, generation, to_read=True)).info()

    async def prefetch(
        self, tenant: str, session: str, generation: str | None, end: int, deadline: float
    ) -> Prefetched:
        """Loads the prefix [0, end) into host memory and, where there is one, onto the device."""
        live, resident = await self._loaded(tenant, session, generation, end, deadline)
        if (memory := self._device.memory) is not None:
            for layer in range(resident.shape.layers):

                def work(layer: int = layer) -> None:
                    memory.prefetch(resident, layer, end)

                await self._engine.run(work, deadline, "encode", tenant)
        return Prefetched(live.generation, live.length, resident.nbytes)

    async def attend(self, tenant: str, query: Query, debias: float | None, deadline: float) -> AttendAnswer:
        """One caller's rows; those of others that wait for the same prefix are answered by the same pass."""
        self._check_rows(query)
        live, resident = await self._loaded(tenant, query.session, query.generation, query.end, deadline)
        prepared = self._to_attend(live, resident, query, debias)
        answered: asyncio.Future[AttendAnswer] = asyncio.get_running_loop().create_future()
        q = HostArray.of(query.q)
        self._attend(live, resident, prepared, q, deadline, answered)
        answer = await answered
        self._quality.attended(live, query, q, answer)
        return answer

    def prepare(self, tenant: str, query: Query, debias: float | None) -> Prepared | None:
        """What `attend_prepared` takes; None if the session has to be looked up or loaded first."""
        check_name("session", query.session)
        loaded = self._registry.loaded(tenant, query.session, query.generation, query.end)
        return None if loaded is None else self._to_attend(*loaded, query, debias)

    def attend_prepared(
        self, tenant: str, prepared: Prepared, q: HostArray, deadline: float, tell: Tell
    ) -> Told[AttendAnswer] | None:
        """Begins to answer q of the query's shape and dtype, without a task; None if the session was touched since."""
        query = prepared.query
        loaded = self._registry.loaded(tenant, query.session, query.generation, query.end)
        if loaded is None:
            return None
        live, resident = loaded
        if prepared.live() is not live or prepared.resident() is not resident or prepared.floor != live.state.floor:
            return None
        told = Told(partial(self._sampled, live, query, q, tell))
        self._attend(live, resident, prepared, q, deadline, told)
        return told

    def _to_attend(self, live: LiveSession, resident: ResidentSession, query: Query, debias: float | None) -> Prepared:
        prefix = self._checked(live, resident, query)
        if debias is not None and not 0 <= debias <= 1:
            raise InvalidArgument("debias", f"{debias} is outside [0, 1]")
        share = attention.debias_of(resident, query.layer, debias)
        key = prefix.key, share, query.q.dtype
        return Prepared(
            query,
            weakref.ref(live),
            weakref.ref(resident),
            prefix.precision,
            prefix.floor,
            share,
            self._asked_heads(query),
            attention.Pass(self._device, prefix, share).repeats(),
            key,
        )

    def _attend(
        self,
        live: LiveSession,
        resident: ResidentSession,
        prepared: Prepared,
        q: HostArray,
        deadline: float,
        answered: Promise,
    ) -> None:
        query, heads = prepared.query, prepared.heads
        prefix = attention.Prefix(resident, query.layer, query.end, prepared.precision, prepared.floor, query.refine)
        asked = attention.Pass(self._device, prefix, prepared.debias)
        if heads.stop - heads.start < resident.shape.query_heads:
            q = HostArray.of(attention.full_heads(q.tensor(), heads.start, resident.shape.query_heads))
        again = asked.again if prepared.repeats else None
        item = attention.Item(q, heads, live)
        self._engine.tell_together(
            Work(live.state.tenant, item, asked.run, prepared.key, deadline, answered, monotonic(), again)
        )

    def _sampled(
        self,
        live: LiveSession,
        query: Query,
        q: HostArray,
        tell: Tell,
        answer: AttendAnswer | None,
        error: BaseException | None,
    ) -> None:
        tell(answer, error)
        if answer is not None:
            self._quality.attended(live, query, q, answer)

    async def score(self, tenant: str, query: Query, start: int, deadline: float) -> AsyncIterator[ScoreAnswer]:
        """Logits of positions [start, query.end) in pieces a message can hold."""
        live, prefix = await self._prepared(tenant, query, deadline)
        if start > query.end:
            raise InvalidArgument("token_start", f"{start} is beyond token_end {query.end}")
        row_bytes = 4 * query.q.shape[0] * query.q.shape[1]
        step = max(1, min(SCORE_TOKENS, self._limits.frame_bytes_max // row_bytes))
        q, heads = self._full(prefix, query), self._asked_heads(query)
        fidelity = await self._engine.run(lambda: attention.fidelity(prefix, q, heads), deadline, tenant=tenant)
        for first in range(start, query.end, step) or (start,):
            part = prefix._replace(end=min(first + step, query.end))

            def work(first: int = first, part: attention.Prefix = part) -> Later[Sequence[torch.Tensor]]:
                return Later(attention.score(self._device, part, first, q))

            (scores,) = await self._engine.run(work, deadline, tenant=tenant)
            yield ScoreAnswer(scores[:, heads], first, live.generation, live.length, fidelity)

    async def top_k(self, tenant: str, query: Query, k: int, oversampling: float | None, deadline: float) -> TopKAnswer:
        """The best k; with `oversampling`, by the finest level among the best oversampling * k of a coarse pass."""
        candidates = self._candidates(query, k, oversampling)
        live, prefix = await self._prepared(tenant, query, deadline)
        q, heads = self._full(prefix, query), self._asked_heads(query)
        answered = prefix.finest() if candidates else prefix

        def work() -> Later[tuple[Sequence[torch.Tensor], Fidelity]]:
            best = attention.top_k(self._device, prefix, q, k, candidates)
            fidelity = attention.fidelity(answered, q, heads)
            return Later(lambda: (best(), fidelity))

        (positions, scores), fidelity = await self._engine.run(work, deadline, tenant=tenant)
        answer = TopKAnswer(positions[:, heads], scores[:, heads], live.generation, live.length, fidelity)
        self._quality.top_k(live, query, answer)
        return answer

    async def _prepared(self, tenant: str, query: Query, deadline: float) -> tuple[LiveSession, attention.Prefix]:
        """The session, loaded up to the query's end, against which the query is checked."""
        self._check_rows(query)
        live, resident = await self._loaded(tenant, query.session, query.generation, query.end, deadline)
        return live, self._checked(live, resident, query)

    def _check_rows(self, query: Query) -> None:
        if len(query.q) > (limit := self._limits.query_rows_max):
            raise InvalidArgument("q.shape", f"{len(query.q)} query tokens are more than {limit}", limit=limit)

    def _checked(self, live: LiveSession, resident: ResidentSession, query: Query) -> attention.Prefix:
        self._check_rows(query)
        tokens, heads, head_dim = query.q.shape
        shape = resident.shape
        check_layer(resident, query.layer)
        if head_dim != shape.head_dim:
            raise InvalidArgument("q.shape", f"head_dim {head_dim} is not the session's {shape.head_dim}")
        if query.head_offset + heads > shape.query_heads:
            raise InvalidArgument(
                "head_offset",
                f"heads [{query.head_offset}, {query.head_offset + heads}) are outside [0, {shape.query_heads})",
                limit=shape.query_heads,
            )
        if tokens * heads * query.end > (limit := self._limits.query_logits_max):
            text = f"{tokens} rows x {heads} heads x {query.end} tokens are more than query_logits_max {limit}"
            raise InvalidArgument("q.shape", text, bound="query_logits_max", limit=limit)
        if query.refine > (limit := self._limits.topk_max):
            raise InvalidArgument("refine", f"{query.refine} is more than {limit}", limit=limit)
        self._check_results("refine", tokens * heads, query.refine)
        floor = live.state.floor
        precision = attention.effective(resident, query.layer, query.precision, floor)
        return attention.Prefix(resident, query.layer, query.end, precision, floor, query.refine)

    async def _loaded(
        self, tenant: str, session: str, generation: str | None, end: int, deadline: float
    ) -> tuple[LiveSession, ResidentSession]:
        check_name("session", session)
        live = await self._registry.open(tenant, session, generation, to_read=True)
        return live, await self._registry.load(live, end, deadline)

    def _candidates(self, query: Query, k: int, oversampling: float | None) -> int:
        factor = 1.0 if oversampling is None else oversampling
        limit = self._limits.topk_max
        if not 1 <= k <= limit:
            raise InvalidArgument("k", f"{k} is outside [1, {limit}]", limit=limit)
        if not 1 <= factor <= limit:
            raise InvalidArgument("oversampling", f"{factor} is outside [1, {limit}]", limit=limit)
        if k * factor > limit:
            raise InvalidArgument("oversampling", f"k x oversampling is more than {limit}", limit=limit)
        self._check_results("k", query.q.shape[0] * query.q.shape[1], int(k * factor))
        return 0 if oversampling is None else int(k * factor)

    def _check_results(self, field: str, logit_rows: int, k: int) -> None:
        if logit_rows * k > (limit := self._limits.topk_results_max):
            text = f"{k} candidates x {logit_rows} rows and heads are more than topk_results_max {limit}"
            raise InvalidArgument(field, text, bound="topk_results_max", limit=limit)

    @staticmethod
    def _full(prefix: attention.Prefix, query: Query) -> torch.Tensor:
        return attention.full_heads(query.q, query.head_offset, prefix.resident.shape.query_heads)

    @staticmethod
    def _asked_heads(query: Query) -> slice:
        return slice(query.head_offset, query.head_offset + query.q.shape[1])
