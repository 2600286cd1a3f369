"""A session with bases of its own is fitted again as it grows: whoever reads it, from wherever, finds one session."""

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from kvstore_client import AsyncKVStoreClient, DataLoss, FailedPrecondition, Precision, Session
from kvstore_codecs.spec import CodecSpec, Matryoshka, ModelShape
from kvstore_server.cli import app
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.making import Made
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.segment import Segment
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import Staged

from ..running import serving

LAYERS, HEADS, D = 2, 2, 64
SHAPE = ModelShape(layers=LAYERS, kv_heads=HEADS, query_heads=6, head_dim=D, dtype="float16", sm_scale=0.125)
SPEC = CodecSpec(keys=Matryoshka(bits=3), values=Matryoshka(bits=3), fit_tokens=512)
CUTS = (0, 600, 1300, 2000, 2100, 4000, 4700, 4800)
LENGTH = CUTS[-1]
BORDERS = (1300, 4000)
"""Where the second and the third epoch begin."""
FIT_RANGES = [(4, 600), None, (1300, 2000), None, None, (4000, 4700), None]
COARSE = Precision(keys_level=1, values_level=1)


def vectors(drifting: bool = True) -> tuple[Tensor, Tensor]:
    """With a steep spectrum that turns into another one at each border, if it drifts."""
    made = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(2, 3, LAYERS, HEADS, D, D, generator=made)).Q
    z = torch.randn(2, LAYERS, LENGTH, HEADS, D, generator=made) * torch.logspace(0.3, -1.5, D)
    parts = zip(pairwise((0, *BORDERS, LENGTH)), range(3), strict=True)
    pieces = [
        torch.einsum("klhde,klnhe->klnhd", turns[:, number * drifting], z[:, :, start:end])
        for (start, end), number in parts
    ]
    k, v = (torch.cat(pieces, 2) + 1).half()
    return k, v


def rows(tokens: int = 3) -> Tensor:
    return torch.randn(tokens, 6, D, generator=torch.Generator().manual_seed(9))


async def filled(
    client: AsyncKVStoreClient, name: str, *, cuts: tuple[int, ...] = CUTS, drifting: bool = True, encode: bool = False
) -> Session:
    session = await client.create_session(name, SHAPE, SPEC)
    k, v = vectors(drifting)
    for start, end in pairwise(cuts):
        await session.append(k[:, start:end], v[:, start:end], encode=encode)
    return session


async def answers(session: Session, end: int = LENGTH) -> list[Tensor]:
    """Of every kind of query over the prefix."""
    q, found = rows(), list[Tensor]()
    for precision in (Precision(), COARSE):
        attended = await session.attention(1, q, end=end, precision=precision)
        best = await session.topk(1, q, 40, end=end, precision=precision, oversampling=2)
        refined = await session.attention(1, q, end=end, precision=precision, refine=64)
        found += [attended.out, attended.lse, refined.out, refined.lse, best.positions, best.logits]
        found += [torch.tensor(attended.fidelity.score_stderr), *(await session.fetch(end=end, precision=precision))]
        found.append((await session.score(1, q, end=end, precision=precision)).logits)
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def epochs_of(folder: Path) -> list[tuple[str, int]]:
    """Of every object in the order of positions: the kind of name, and its epoch."""
    found = list[tuple[int, str, int]]()
    for path in folder.glob("default/s/*/*/*.safetensors"):
        with safe_open(path, "pt") as opened:
            facts = opened.metadata()
        assert facts["version"] == ("4" if "epoch" in facts else facts["version"])
        found.append((int(facts["start"]), path.parent.name, int(facts.get("epoch", "0"))))
    return [each[1:] for each in sorted(found)]


async def test_every_epoch_is_answered_as_it_decodes_by_every_server(tmp_path: Path) -> None:
    q = rows()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await filled(client, "s")
        before = await answers(session)
        entries = server.sessions.registry._open["default", "s"].state.entries or []
        assert [entry.fit_range for entry in entries] == FIT_RANGES
        assert [entry.epoch for entry in entries] == [0, 0, 1, 1, 1, 2, 2]
        keys, values = (x[1].double().repeat_interleave(3, dim=1) for x in await session.fetch(dtype=torch.float32))
        logits = torch.einsum("thd,nhd->thn", q.double(), keys) * SHAPE.sm_scale
        score = (await session.score(1, q)).logits
        torch.testing.assert_close(score.double(), logits, atol=4e-2, rtol=0)
        best = await session.topk(1, q, 40)
        assert torch.equal(best.logits, score.topk(40).values)
        out, lse = await session.attend(1, q, debias=0.0)
        torch.testing.assert_close(lse.double(), logits.logsumexp(2), atol=2e-2, rtol=0)
        torch.testing.assert_close(
            out.double(), torch.einsum("thn,nhd->thd", logits.softmax(2), values), atol=2e-2, rtol=0
        )
        # A server that knows the session from before an epoch began reads on.
        async with serving(tmp_path) as other, AsyncKVStoreClient(f"127.0.0.1:{other.port}") as behind:
            late = await behind.open_session("s")
            assert_same(await answers(late), before)
            k, v = vectors()
            await session.append(k[:, :50], v[:, :50])
            await late.refresh()
            assert_same(await answers(late, LENGTH + 50), await answers(session, LENGTH + 50))
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        assert_same(await answers(await client.open_session("s")), before)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("encode", [False, True])
async def test_an_append_that_was_made_ready_while_an_epoch_began_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encode: bool
) -> None:
    commit, is_next, asked = CommitLog.commit, Made.is_next, list[bool]()

    def slowly(
        self: CommitLog, state: SessionState, segment: Segment, staged: Staged | None
    ) -> Committed | AlreadyPresent:
        time.sleep(0.3)
        return commit(self, state, segment, staged)

    def noted(self: Made, live: LiveSession) -> bool:
        asked.append(is_next(self, live))
        return asked[-1]

    k, v = vectors()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        expected = await answers(await filled(client, "in-turn"))
        session = await filled(client, "ahead", cuts=CUTS[:3])
        behind = await client.open_session("ahead")
        monkeypatch.setattr(CommitLog, "commit", slowly)
        monkeypatch.setattr(Made, "is_next", noted)
        first = asyncio.create_task(session.append(k[:, 1300:2000], v[:, 1300:2000], encode=encode))
        await asyncio.sleep(0.1)
        await behind.append(k[:, 2000:2100], v[:, 2000:2100], start=2000, encode=encode)
        await first
        for start, end in pairwise(CUTS[4:]):
            await behind.append(k[:, start:end], v[:, start:end], encode=encode)
        assert asked[0] is False
        assert_same(await answers(behind), expected)


async def test_epochs_halve_what_drift_costs_and_cost_nothing_without_it(tmp_path: Path) -> None:
    """Beside a session that never brings enough tokens at once to be fitted again."""
    small = (0, 600, *range(700, LENGTH, 100), LENGTH)
    errors: dict[bool, list[float]] = {}
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        for drifting in (True, False):
            k, _ = vectors(drifting)
            errors[drifting] = []
            for cuts in (CUTS, small):
                session = await filled(client, f"s{drifting}{len(cuts)}", cuts=cuts, drifting=drifting)
                decoded = (await session.fetch(start=BORDERS[0], dtype=torch.float32))[0]
                errors[drifting].append(float((decoded - k[:, BORDERS[0] :].float()).norm()))
    print(f"error of keys with epochs and without: drifting {errors[True]}, steady {errors[False]}")
    assert errors[True][0] < errors[True][1] / 2
    assert errors[False][0] < errors[False][1] * 1.03


async def test_a_fork_goes_on_in_the_epoch_that_it_was_cut_in(tmp_path: Path) -> None:
    k, v = vectors()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await filled(client, "s")
        whole = await session.fetch()
        for end, epochs in ((1300, 1), (1301, 2), (2050, 2), (4000, 2), (4100, 3)):
            fork = await session.fork(f"fork{end}", end=end)
            assert_same(await answers(fork, end), await answers(session, end))
            for start, last in ((end, end + 30), (end + 30, end + 60)):
                await fork.append(k[:, start:last], v[:, start:last], encode=last > end + 30)
            found = await fork.fetch()
            assert all(torch.equal(a[:, :end], b[:, :end]) for a, b in zip(found, whole, strict=True))
            if end not in BORDERS:  # else these tokens have another basis
                assert all(torch.equal(a, b[:, : end + 60]) for a, b in zip(found, whole, strict=True))
            assert len(server.sessions.registry._open["default", fork.name].fit_entries) == epochs
            assert_same(await answers(await fork.fork(f"again{end}", end=end), end), await answers(session, end))
        late = await session.fork("late", end=1200)
        await late.append(k[:, 1200:4000], v[:, 1200:4000])
        assert [e.fit_range for e in server.sessions.registry._open["default", "late"].fit_entries] == [
            (4, 600),
            (1200, 4000),
        ]


async def test_objects_of_one_epoch_are_merged_and_cut_and_stay_what_they_were(tmp_path: Path) -> None:
    cuts = (0, 300, *range(600, 1300, 100), 1300, 2000, *range(2100, 4000, 100), 4000, 4700, 4750, 4800)
    swept = {"staleness_seconds": 0.2, "sweep_seconds": 0.2, "gc_grace_seconds": 0.5, "merge": {"objects_min": 2}}
    async with (
        serving(tmp_path, merge={"objects_min": None}) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
    ):
        session = await filled(client, "s", cuts=cuts)
        before = await answers(session)
        assert len(epochs_of(tmp_path)) == len(cuts) - 1
    async with serving(tmp_path, **swept) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        await until(lambda: len(epochs_of(tmp_path)) <= 5)
        assert {("merged", epoch) for epoch in range(3)} <= set(epochs_of(tmp_path))
        session = await client.open_session("s")
        assert_same(await answers(session), before)
    cold = {"unused_seconds": 0.5, "keys_level": 1, "values_level": 1}
    async with (
        serving(tmp_path, downgrade=cold, **swept) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
    ):
        await until(lambda: epochs_of(tmp_path) == [("merged", 0), ("merged", 1), ("merged", 2)])
        session = await client.open_session("s")
        found, early = await answers(session), await answers(session, 2050)
        fork = await session.fork("fork", end=2050)
        assert_same(await answers(fork, 2050), early)
    assert_same(found[len(found) // 2 :][:2], before[len(before) // 2 :][:2])
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output


async def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while True:
        try:
            if condition():
                return
        except FileNotFoundError:  # an object was removed meanwhile
            pass
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)


async def test_sketches_that_a_client_makes_are_of_the_newest_epoch(tmp_path: Path) -> None:
    """It sends the appends that begin one as vectors, and what it encoded for the one before again as such."""
    k, v = vectors()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        plain, encoded = await filled(client, "plain"), await filled(client, "encoded", encode=True)
        for one, other in zip(await plain.fetch(), await encoded.fetch(), strict=True):
            assert torch.equal(one, other)
        entries = server.sessions.registry._open["default", "encoded"].state.entries or []
        assert [entry.fit_range for entry in entries] == FIT_RANGES
        first, second = await client.create_session("two", SHAPE, SPEC), await client.open_session("two")
        await first.append(k[:, :600], v[:, :600])
        await second.refresh()
        await second.append(k[:, 600:1300], v[:, 600:1300], encode=True)
        await first.refresh()
        await first.append(k[:, 1300:2000], v[:, 1300:2000])
        await second.refresh()
        await second.append(k[:, 2000:2100], v[:, 2000:2100], encode=True)
        for one, other in zip(await plain.fetch(end=2100), await second.fetch(), strict=True):
            assert torch.equal(one, other)


async def test_packed_sketches_come_one_epoch_at_a_time_with_the_fit_that_reads_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await filled(client, "s")
        with pytest.raises(FailedPrecondition, match="from 1300 on"):
            await session.fetch_sketches()
        found = [await session.fetch_sketches(start=start, end=end) for start, end in pairwise((0, *BORDERS, LENGTH))]
        newest = await session.fetch_sketches(start=0, end=0)
    ranges = [(each.fit.token_start, each.fit.token_end) for each in found if each.fit]
    assert ranges == [each for each in FIT_RANGES if each]
    assert newest.fit == found[-1].fit


async def test_a_lost_fit_is_the_loss_of_what_it_reads_and_nothing_is_added_to_it(tmp_path: Path) -> None:
    k, v = vectors()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await filled(client, "s", cuts=CUTS[:5])
        before = await answers(session, 1300)
    (path,) = tmp_path.glob("default/s/*/log/000000001300.safetensors")
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.open_session("s")
        assert_same(await answers(session, 1300), before)
        with pytest.raises(DataLoss):
            await answers(session, 2100)
        for tokens in (10, 900):
            with pytest.raises(DataLoss):
                await session.append(k[:, 2100 : 2100 + tokens], v[:, 2100 : 2100 + tokens])
