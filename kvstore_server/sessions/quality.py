"""What answers are worth: a sample of them is computed again from vectors that are kept exactly for this.

Of each new session one layer's vectors are kept in memory as they were appended, of the youngest sessions and within
`quality.exact_bytes_max`; a session with a part that its client encoded has none. Which layer follows from the
session's name, so that all layers are looked at.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import random
from zlib import crc32

import torch
from torch import Tensor

from kvstore_codecs.spec import Kind, ModelShape
from kvstore_kernels.host import HostArray
from kvstore_server.config import Quality as Settings
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.model import AttendAnswer, Query, TopKAnswer
from kvstore_server.telemetry import Telemetry, codec_label

LOG = logging.getLogger(__name__)
SETTLE_SECONDS = 10.0
Pair = tuple[Tensor, Tensor]
"""Keys and values [n, H, D] of one layer."""


@dataclass
class Kept:
    """Positions [0, length) of one layer of one session, append by append."""

    layer: int
    pairs: list[Pair] = field(default_factory=list)
    length: int = 0
    nbytes: int = 0

    def add(self, pair: Pair, tokens: int) -> None:
        self.pairs.append(pair)
        self.length += tokens
        self.nbytes += sum(part.nbytes for part in pair)

    def below(self, end: int) -> Pair:
        """Of positions [0, end), float32."""
        keys, values = (torch.cat(parts)[:end].float() for parts in zip(*self.pairs, strict=True))
        return keys, values


class Quality:
    """One comparison at a time, in a thread of its own; answers never wait for it."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self._settings, self._telemetry = settings, telemetry
        self._kept: OrderedDict[tuple[str, str, str], Kept] = OrderedDict()
        self._comparing: asyncio.Task[None] | None = None

    @property
    def _enabled(self) -> bool:
        return bool(self._settings.exact_bytes_max and self._settings.sample_share)

    @property
    def kept_bytes(self) -> int:
        return sum(kept.nbytes for kept in list(self._kept.values()))

    @property
    def kept_sessions(self) -> int:
        return len(self._kept)

    def copied(self, live: LiveSession, start: int, vectors: Callable[[int, Kind], Tensor]) -> Pair | None:
        """What `keep` would keep of an append at `start`; on the thread that commits it."""
        if not self._enabled or (start and _key(live) not in self._kept):
            return None
        layer = _layer(live)
        return vectors(layer, "keys").clone(), vectors(layer, "values").clone()

    def keep(self, live: LiveSession, start: int, tokens: int, pair: Pair | None) -> None:
        """An append was committed; `pair` None: nothing was copied of it."""
        key = _key(live)
        if start == 0:
            self._kept[key] = Kept(_layer(live))
        kept = self._kept.get(key)
        if kept is None:
            return
        if pair is None or start != kept.length:
            del self._kept[key]
            return
        kept.add(pair, tokens)
        while self.kept_bytes > self._settings.exact_bytes_max:
            self._kept.popitem(last=False)

    def keeps(self, live: LiveSession, query: Query) -> bool:
        """Whether an answer to the query could be compared."""
        kept = self._kept.get(_key(live)) if self._kept else None
        return kept is not None and kept.layer == query.layer and 0 < query.end <= kept.length

    def attended(self, live: LiveSession, query: Query, q: HostArray, answer: AttendAnswer) -> None:
        """An answer of Attend to such a query of these rows q went out."""

        def compare(keys: Tensor, values: Tensor) -> None:
            out, lse = exact_attention(live.state.shape, replace(query, q=q.tensor()), keys, values)
            error = (answer.out.tensor()[0].float() - out).norm() / out.norm().clamp_min(1e-30)
            lse_error = (answer.lse.tensor()[0] - lse).mean()
            self._telemetry.attended(codec_label(live.state.spec), float(error), float(lse_error))

        self._sample(live, query, compare)

    def top_k(self, live: LiveSession, query: Query, answer: TopKAnswer) -> None:
        """An answer of TopK went out."""

        def compare(keys: Tensor, _: Tensor) -> None:
            logits = exact_logits(live.state.shape, query, keys)
            found = answer.positions[0].to(torch.int64)
            best = logits.topk(found.shape[-1]).indices
            hits = (found[:, :, None] == best[:, None, :]).any(dim=2)
            self._telemetry.recalled(codec_label(live.state.spec), float(hits.float().mean()))

        self._sample(live, query, compare)

    async def settle(self) -> None:
        """Returns when no comparison is under way."""
        if self._comparing is not None:
            await asyncio.wait({self._comparing}, timeout=SETTLE_SECONDS)

    def _sample(self, live: LiveSession, query: Query, compare: Callable[[Tensor, Tensor], None]) -> None:
        if not self.keeps(live, query):
            return
        kept = self._kept[_key(live)]
        busy = self._comparing is not None and not self._comparing.done()
        if busy or random() >= self._settings.sample_share:  # noqa: S311
            return

        async def run() -> None:
            try:
                await asyncio.to_thread(lambda: compare(*kept.below(query.end)))
            except Exception:
                LOG.exception("an answer could not be compared with the exact one")

        self._comparing = asyncio.create_task(run())


def _layer(live: LiveSession) -> int:
    return crc32(live.state.session.encode()) % live.state.shape.layers


def _key(live: LiveSession) -> tuple[str, str, str]:
    return live.state.tenant, live.state.session, live.generation


def exact_logits(shape: ModelShape, query: Query, keys: Tensor) -> Tensor:
    """float32 [heads, N] of the query's first row against keys [N, H, D]."""
    q = query.q[0].float()
    logits = torch.einsum("hd,nhd->hn", q, keys[:, _kv_heads(shape, query)]) * shape.sm_scale
    cap = shape.logit_soft_cap
    return cap * torch.tanh(logits / cap) if cap else logits


def exact_attention(shape: ModelShape, query: Query, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """out [heads, D] and lse [heads] of the query's first row over keys and values [N, H, D], float32."""
    logits = exact_logits(shape, query, keys)
    out = torch.einsum("hn,nhd->hd", logits.softmax(1), values[:, _kv_heads(shape, query)])
    return out, logits.logsumexp(1)


def _kv_heads(shape: ModelShape, query: Query) -> Tensor:
    """Which KV head each of the query's heads reads."""
    heads = query.head_offset + torch.arange(query.q.shape[1])
    return heads // (shape.query_heads // shape.kv_heads)
