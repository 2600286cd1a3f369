"""Queries over the blocks of one layer: what runs on the device thread."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvstore_codecs import projected
from kvstore_codecs.plan import KindPlan, ProjectedPlan, SignPlan
from kvstore_codecs.spec import KINDS, Kind, projection_named
from kvstore_kernels import Backend, DenseRows, ScoreNoise, SignRows, mean_noise, merge_states, score_noise
from kvstore_kernels.backend import Attended, AttendedHost
from kvstore_kernels.cuda.pages import SignPages
from kvstore_kernels.host import HostArray
from kvstore_server.errors import FailedPrecondition
from kvstore_server.memory.device import DeviceMemory
from kvstore_server.memory.resident import Blocks, ResidentSession
from kvstore_server.scheduling.completion import Later
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.model import AttendAnswer, Fidelity, Precision
from kvstore_server.storage.keys import POSITION_MAX
from kvstore_server.storage.meta import Floor

NOISE, WORTH = "noise", "worth"
"""What is kept with blocks of the error of their logits, and of what their answers say of themselves."""
Fetch = Callable[[], Sequence[Tensor]]
"""Waits for results that are on their way to host memory."""


@dataclass(frozen=True)
class Device:
    """Where the ops run; `memory` None: on host rows."""

    backend: Backend
    memory: DeviceMemory | None

    def setups(self) -> int:
        """How many layers were brought to the device, and launches recorded, for queries that come later as well."""
        return self.backend.recordings + (0 if self.memory is None else self.memory.first_loads)

    def blocks(self, prefix: "Prefix", start: int = 0) -> Blocks:
        """Positions [start, prefix.end) as the backend reads them."""
        if self.memory is None or _is_projected(prefix):
            return host_blocks(prefix.resident, prefix.layer, start, prefix.end, prefix.precision)
        return self.memory.blocks(prefix.resident, prefix.layer, start, prefix.end, _levels_of(prefix.precision))


class Prefix(NamedTuple):
    """Positions [0, end) of one layer of one session, read at `precision`."""

    resident: ResidentSession
    layer: int
    end: int
    precision: Precision
    floor: Floor = (0, 0)
    """Its keys and values have no finer levels."""
    refine: int = 0
    """Attention reads so many tokens of each query row and head, the best at `precision`, at the finest level."""

    @property
    def key(self) -> Hashable:
        """Equal for prefixes that one pass can read; an item of work holds the session, so its id is its own."""
        levels = self.precision.keys_level, self.precision.values_level
        return id(self.resident), self.layer, self.end, *levels, self.refine

    def finest(self) -> "Prefix":
        keys, values = self.floor
        return self._replace(precision=replace(self.precision, keys_level=keys, values_level=values), refine=0)


class Item(NamedTuple):
    """One caller's rows [T, Hq, D] of a pass, which heads it asked for, and the session as the caller knows it."""

    q: HostArray
    heads: slice
    live: LiveSession


def _is_projected(prefix: "Prefix") -> bool:
    """A layer whose coordinates are read from host memory, wherever the ops run."""
    plans = (prefix.resident.plan_of(prefix.layer, kind) for kind in KINDS)
    return any(isinstance(plan, ProjectedPlan) for plan in plans)


def full_heads(q: Tensor, head_offset: int, query_heads: int) -> Tensor:
    """q [T, heads, D] as [T, query_heads, D], zero where the caller has no heads."""
    if q.shape[1] == query_heads:
        return q
    whole = q.new_zeros((q.shape[0], query_heads, q.shape[2]))
    whole[:, head_offset : head_offset + q.shape[1]] = q
    return whole


class Pass(NamedTuple):
    """Attention of several callers over one prefix, all in one pass over its rows."""

    device: Device
    prefix: Prefix
    debias: float

    def run(self, items: list[Item]) -> Later[list[AttendAnswer]]:
        """Each item's answer."""
        device, prefix = self.device, self.prefix
        if prefix.refine and (device.memory is not None or _is_projected(prefix)):
            prefix = prefix.finest()  # a device has no op that leaves tokens out
        blocks = device.blocks(prefix)
        noise = _noise(prefix, blocks.kept)
        q = HostArray.joined([item.q for item in items]).tensor()
        fetch = _begin(device, prefix, q, blocks, noise, self.debias)
        return Later(lambda: _answers(prefix, items, _on_host(fetch()), blocks.kept))

    def repeats(self) -> bool:
        """Whether a device may have only to repeat what it did before."""
        return self.device.memory is not None and not self.prefix.refine and not _is_projected(self.prefix)

    def again(self, items: list[Item]) -> Later[list[AttendAnswer]] | None:
        """As `run`, of a pass that `repeats`, if that is all the device has to do; None otherwise."""
        prefix, memory = self.prefix, self.device.memory
        assert memory is not None
        blocks = memory.at_hand(prefix.resident, prefix.layer, 0, prefix.end, _levels_of(prefix.precision))
        if blocks is None or NOISE not in blocks.kept:
            return None
        q, kept, scale = [item.q for item in items], blocks.kept, _logit_scale(prefix)
        fetch = self.device.backend.attend_again(q, **scale, debias=self.debias, noise=kept[NOISE], kept=kept)
        return None if fetch is None else Later(lambda: _answers(prefix, items, fetch.host(), kept), fetch.ready)


def _on_host(attended: Attended) -> AttendedHost:
    out, lse, variances = attended
    return HostArray.of(out), HostArray.of(lse), None if variances is None else HostArray.of(variances)


def _answers(prefix: Prefix, items: list[Item], attended: AttendedHost, kept: dict[Any, Any]) -> list[AttendAnswer]:
    """Each item's rows and heads of what was attended for all; `kept` is the prefix's."""
    out, lse, variances = attended
    numbers = None if variances is None else variances.array.tolist()
    answers, first = list[AttendAnswer](), 0
    for item in items:
        rows, heads, state = len(item.q.array), item.heads, (out, lse)
        fidelity = _fidelity(prefix, numbers and numbers[first : first + rows], heads, kept)
        if (rows, heads.stop - heads.start) != lse.array.shape:
            own = slice(first, first + rows), heads
            state = HostArray(out.array[own], out.dtype), HostArray(lse.array[own], lse.dtype)
        answers.append(AttendAnswer(*state, item.live.generation, item.live.length, fidelity))
        first += rows
    return answers


def _begin(
    device: Device, prefix: Prefix, q: Tensor, blocks: Blocks, noise: ScoreNoise | None, debias: float
) -> Callable[[], Attended]:
    scores = {**_logit_scale(prefix), "debias": debias}
    if not blocks:
        nothing = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf), None
        return lambda: nothing
    if prefix.refine or _is_projected(prefix):
        if prefix.refine:
            states = list(_refined(device.backend, prefix, q, blocks, scores))
        else:
            states = [projected.attend(device.backend, q, b.keys, b.values, **scores) for b in blocks]
        out, lse = merge_states(states)
        fetch = device.backend.to_host((out.to(q.dtype), lse))
        variances = None if noise is None else noise.variance(q)
        return lambda: (*fetch(), variances)  # pyright: ignore[reportReturnType]
    parts = [(block.keys, block.values) for block in blocks]
    return device.backend.attend_all(q, parts, **scores, noise=noise, kept=blocks.kept)


def _refined(
    backend: Backend, prefix: Prefix, q: Tensor, blocks: Blocks, scores: dict[str, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """States of host blocks; the best tokens are those of each sketched block."""
    finest = prefix.finest()
    for block, fine in zip(
        blocks, host_blocks(prefix.resident, prefix.layer, 0, prefix.end, finest.precision), strict=True
    ):
        if isinstance(block.keys, SignRows):
            pairs = (block.keys, block.values), (fine.keys, fine.values)
            yield backend.attend_refined(q, *pairs, prefix.refine, **scores)
        else:
            yield backend.attend(q, block.keys, block.values, **scores)


def score(device: Device, prefix: Prefix, start: int, q: Tensor) -> Fetch:
    """float32 logits [T, Hq, end - start] of positions [start, prefix.end)."""
    how = _logit_scale(prefix)
    parts = [projected.score(device.backend, q, block.keys, **how) for block in device.blocks(prefix, start)]
    if not parts:
        return lambda: (torch.empty((*q.shape[:2], 0)),)
    return device.backend.to_host((torch.cat(parts, dim=2) if len(parts) > 1 else parts[0],))


def top_k(device: Device, prefix: Prefix, q: Tensor, k: int, candidates: int) -> Fetch:
    """Positions int64 and logits float32 [T, Hq, min(k, end)], best first, ties by lower position.

    `candidates` > 0: the best so many at the prefix's precision are scored again at the finest level.
    """
    if not candidates:
        return device.backend.to_host(_best(device, prefix, q, k))
    positions, scores = _best(device, prefix, q, candidates)
    positions, order = positions.sort(dim=2)
    scores = scores.gather(2, order)
    for block in device.blocks(prefix.finest()):
        if isinstance(block.keys, SignRows | SignPages):
            places = positions - block.start
            within = (places >= 0) & (places < block.end - block.start)
            places = places.clamp(0, block.end - block.start - 1)
            again = device.backend.score_at(q, block.keys, places, **_logit_scale(prefix))
            scores = torch.where(within, again, scores)
    order, best = device.backend.topk(scores, k)
    return device.backend.to_host((positions.gather(2, order), best))


def _best(device: Device, prefix: Prefix, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of each block, then of all: blocks come in the order of positions, so ties stay in it."""
    found = list[tuple[Tensor, Tensor]]()
    for block in device.blocks(prefix):
        positions, scores = projected.best(device.backend, q, block.keys, k, **_logit_scale(prefix))
        found.append((positions + block.start, scores))
    if not found:
        return torch.empty((*q.shape[:2], 0), dtype=torch.int64), torch.empty((*q.shape[:2], 0))
    if len(found) == 1:
        return found[0]
    positions, scores = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    order, best = device.backend.topk(scores, k)
    return positions.gather(2, order), best


def _logit_scale(prefix: Prefix) -> dict[str, float]:
    shape = prefix.resident.shape
    return {"sm_scale": shape.sm_scale, "logit_soft_cap": shape.logit_soft_cap}


def fidelity(prefix: Prefix, q: Tensor, heads: slice) -> Fidelity:
    """What an answer over the prefix is worth; the levels are those really read."""
    noise = _noise(prefix, {})
    return _fidelity(prefix, None if noise is None else noise.variance(q).tolist(), heads, {})


def _noise(prefix: Prefix, kept: dict[Any, Any]) -> ScoreNoise | None:
    """Of logits over the prefix's sketched keys; None where there are none. `kept` is the prefix's."""
    if NOISE not in kept:
        parts, resident, layer = list[tuple[int, ScoreNoise]](), prefix.resident, prefix.layer
        for number, first, last in resident.sketched_ranges(0, prefix.end):
            if isinstance(keys := resident.plan_of(layer, "keys", number), SignPlan):
                squares = resident.mean_squares(layer, number, last)
                parts.append((last - first, score_noise(keys.levels[_keys_level(prefix)], squares)))
        kept[NOISE] = mean_noise(parts) if parts else None
    return kept[NOISE]


def _keys_level(prefix: Prefix) -> int:
    """The level really read."""
    return min(prefix.precision.keys_level, _levels(prefix.resident.plan_of(prefix.layer, "keys")) - 1)


def _fidelity(prefix: Prefix, variances: list[list[float]] | None, heads: slice, kept: dict[Any, Any]) -> Fidelity:
    """Of a caller's rows of `variances` [T][Hq], of which these heads are its own; `kept` is the prefix's."""
    worth = kept.get(WORTH)
    if worth is None:
        worth = kept[WORTH] = _worth(prefix)
    if variances is None:
        return worth
    own = variances[0][heads]  # a few numbers, for which tensors would take longer
    for row in variances[1:]:
        own += row[heads]
    return Fidelity._make((*worth[:-1], prefix.resident.shape.sm_scale * sqrt(sum(own) / len(own))))


def _worth(prefix: Prefix) -> Fidelity:
    """What a prefix's answers say of themselves whatever q is."""
    resident, layer = prefix.resident, prefix.layer
    keys, values = resident.plan_of(layer, "keys"), resident.plan_of(layer, "values")
    sketched = resident.exact_end is not None and prefix.end > resident.exact_end
    precision = Precision(_keys_level(prefix), min(prefix.precision.values_level, _levels(values) - 1))
    if ("codec", layer) not in resident.facts:
        resident.facts["codec", layer] = _codec(resident, layer)
    codec, calibrated = resident.facts["codec", layer]
    exact = not sketched or keys.widths is values.widths is None
    beyond = 0 if exact else max(0, prefix.end - max(calibrated, resident.exact_end or 0))
    return Fidelity(codec, "" if resident.plan is None else resident.plan.fingerprint, precision, exact, beyond)


def _codec(resident: ResidentSession, layer: int) -> tuple[str, int]:
    """The name of the codec of a layer's keys, and below which positions the projections of both are calibrated."""
    if resident.plan is None:
        return "raw", POSITION_MAX
    codecs = [resident.plan.spec.for_layer(layer, kind, resident.shape.layers) for kind in KINDS]
    named = [sha256 for codec in codecs if (sha256 := projection_named(codec))]
    return codecs[0].name, min((resident.max_positions[sha256] for sha256 in named), default=POSITION_MAX)


def _levels(plan: KindPlan) -> int:
    return len(plan.levels) if isinstance(plan, SignPlan) else 1


def effective(resident: ResidentSession, layer: int, precision: Precision, floor: Floor) -> Precision:
    """The levels that are read: at most as fine as the floor.

    FailedPrecondition when `required` and the codec has no such level, or the session no longer has it.
    """
    finest = list[int]()
    for (kind, level), cut in zip(_levels_of(precision).items(), floor, strict=True):
        levels = _levels(resident.plan_of(layer, kind))
        if precision.required and level >= levels:
            raise FailedPrecondition("NO_LEVEL", f"{kind} of layer {layer} have {levels} levels", limit=levels)
        if precision.required and level < (least := min(cut, levels - 1)):
            text = f"{kind} of layer {layer} were cut to level {least}"
            raise FailedPrecondition("NO_LEVEL", text, limit=least)
        finest.append(max(level, cut))
    return replace(precision, keys_level=finest[0], values_level=finest[1])


def debias_of(resident: ResidentSession, layer: int, asked: float | None) -> float:
    """The share asked for, or the codec's default."""
    if asked is not None:
        return asked
    plan = resident.plan_of(layer, "keys")
    return plan.debias if isinstance(plan, SignPlan) else 0.0


def host_blocks(resident: ResidentSession, layer: int, start: int, end: int, precision: Precision) -> Blocks:
    """Positions [start, end) of `layer` as they are stored, read at `precision`."""
    return Blocks(resident.blocks(layer, start, end, _levels_of(precision)))


def decoded(device: Device, blocks: Blocks, kind: Kind, dtype: torch.dtype) -> Fetch:
    """Keys or values [N, H, D] of each host block."""
    found = list[Tensor]()
    for block in blocks:
        rows = block.keys if kind == "keys" else block.values
        if isinstance(rows, DenseRows):
            found.append(rows.data.to(dtype))
        elif isinstance(rows, projected.ProjectedRows):
            found.append(projected.decode(device.backend, rows).to(dtype))
        else:
            assert isinstance(rows, SignRows)
            found.append(device.backend.decode(rows, dtype))
    return device.backend.to_host(found)


def _levels_of(precision: Precision) -> dict[Kind, int]:
    return {"keys": precision.keys_level, "values": precision.values_level}
