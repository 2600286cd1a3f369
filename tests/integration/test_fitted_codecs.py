"""Codecs with fitted bases through a server: their own tokens' bases, projections, levels, restarts."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore_client import (
    AsyncKVStoreClient,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Precision,
)
from kvstore_codecs.artifact import ProjectionHeader, write_projection
from kvstore_codecs.fit import Moments, fit_basis
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import KINDS, CodecSpec, LayerOverride, Matryoshka, ModelShape, Projected, Raw, Rotated
from kvstore_server.storage.local import LocalStore
from kvstore_server.storage.verify import verify_store

from ..running import serving

LAYERS, HEADS, D = 2, 2, 64
SHAPE = ModelShape(layers=LAYERS, kv_heads=HEADS, query_heads=6, head_dim=D, dtype="float16", sm_scale=0.125)


def vectors(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """With a steep spectrum, so that a basis matters."""
    made = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(2, LAYERS, HEADS, D, D, generator=torch.Generator().manual_seed(1))).Q
    z = torch.randn(2, LAYERS, tokens, HEADS, D, generator=made) * torch.logspace(0.3, -1.5, D)
    k, v = (torch.einsum("klhde,klnhe->klnhd", turns, z) + 1).half()
    return k, v


def rows(tokens: int = 3) -> Tensor:
    return torch.randn(tokens, 6, D, generator=torch.Generator().manual_seed(9))


def projection(metric: bool = True, heads: int = HEADS, max_position: int = 2000) -> bytes:
    parts: dict[str, Tensor] = {}
    for kind, x in zip(KINDS, vectors(2000, seed=5), strict=True):
        moments = [Moments(heads, D) for _ in range(LAYERS)]
        for layer, each in enumerate(moments):
            each.add(x[layer, :, :heads])
        ones = torch.eye(D).expand(LAYERS, heads, D, D).contiguous()
        bases = [fit_basis(each.covariance, one) for each, one in zip(moments, ones, strict=True)]
        parts[f"{kind}.basis"] = torch.cat([basis.matrix for basis in bases])
        parts[f"{kind}.weights"] = torch.cat([basis.weights for basis in bases])
        parts[f"{kind}.mean"] = torch.stack([each.mean.float() for each in moments])
        if metric:
            parts[f"{kind}.metric"] = ones
    header = ProjectionHeader(
        model_fingerprint="",
        layers=LAYERS,
        kv_heads=heads,
        head_dim=D,
        metric="output",
        max_position=max_position,
        calibration_tokens=2000,
        calibration_length=2000,
        has_metrics=metric,
    )
    return write_projection(header, parts)


def codecs(sha256: str) -> dict[str, CodecSpec]:
    own, given, mixed = Matryoshka(bits=3), Matryoshka(bits=3, basis=f"projection:{sha256}"), f"session:{sha256}"
    return {
        "session": CodecSpec(keys=own, values=own, fit_tokens=512),
        "projection": CodecSpec(keys=given, values=given, mean="none"),
        "own basis, lent metric": CodecSpec(
            keys=Matryoshka(basis=mixed), values=Matryoshka(basis=mixed), fit_tokens=512
        ),
        "own means, lent basis": CodecSpec(keys=given, values=Rotated(), fit_tokens=512),
        "projected": CodecSpec(keys=Projected(share=0.5), values=Projected(share=0.75), fit_tokens=512),
        "few bits": CodecSpec(keys=Matryoshka(bits=0.5), values=Matryoshka(bits=0.5), fit_tokens=512),
        "mixed": CodecSpec(
            keys=Projected(basis=f"projection:{sha256}"),
            values=own,
            overrides=(LayerOverride(layers=(0,), keys=Raw(), values=Rotated()),),
            fit_tokens=512,
        ),
    }


CODECS_WITH_PROJECTION = {"projection", "own basis, lent metric", "own means, lent basis", "mixed"}
NAMES = list(codecs("0" * 64))


@pytest.mark.parametrize("name", NAMES)
async def test_attention_is_that_over_decoded_vectors_and_survives_a_restart(tmp_path: Path, name: str) -> None:
    """Estimators and decoder agree; a second server reads the same bases from the same objects."""
    k, v = vectors(1000)
    q = rows()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        sha256 = await client.put_projection(projection())
        session = await client.create_session("s", SHAPE, codecs(sha256)[name])
        await session.append(k[:, :600], v[:, :600])
        await session.append(k[:, 600:], v[:, 600:])
        decoded = await session.fetch(dtype=torch.float32)
        assert (await session.info()).max_position == (2000 if name in CODECS_WITH_PROJECTION else None)
        before = [await session.attend(layer, q, debias=0.0) for layer in range(LAYERS)]
        for layer, (out, lse) in enumerate(before):
            keys, values = (x[layer].double().repeat_interleave(3, dim=1) for x in decoded)
            logits = torch.einsum("thd,nhd->thn", q.double(), keys) * SHAPE.sm_scale
            expected = torch.einsum("thn,nhd->thd", logits.softmax(2), values)
            torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=0)
            torch.testing.assert_close(lse.double(), logits.logsumexp(2), atol=2e-2, rtol=0)
            score = (await session.score(layer, q)).logits
            torch.testing.assert_close(score.double(), logits, atol=4e-2, rtol=0)
    assert (decoded[0] - k.float()).norm() < (0.6 if name == "few bits" else 0.3) * (k.float() - 1).norm()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.open_session("s")
        after = [await session.attend(layer, q, debias=0.0) for layer in range(LAYERS)]
    assert all(
        torch.equal(a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert verify_store(LocalStore(tmp_path)).damaged == []


@pytest.mark.parametrize("name", NAMES)
async def test_sketches_made_by_a_client_are_those_of_the_server(tmp_path: Path, name: str) -> None:
    """The client gets bases from Fetch and projections by their hash, and arrives at the same plan."""
    k, v = vectors(900)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        sha256 = await client.put_projection(projection())
        both = []
        for encode in (False, True):
            session = await client.create_session(f"s{encode}", SHAPE, codecs(sha256)[name])
            await session.append(k[:, :550], v[:, :550])
            await session.append(k[:, 550:], v[:, 550:], encode=encode)
            both.append((await session.fetch(dtype=torch.float32), await session.fetch_sketches()))
        header = server.sessions.registry._open["default", "sTrue"].state.entries
    assert header is not None
    (decoded, sketches), (decoded_here, sketches_here) = both
    assert all(torch.equal(a, b) for a, b in zip(decoded, decoded_here, strict=True))
    assert sketches.fit == sketches_here.fit
    assert header[-1].stored_bytes < 2 * k.nbytes


async def test_levels_of_a_matryoshka_session_get_coarser_and_guide_top_k(tmp_path: Path) -> None:
    """A coarse pass over half of the bits, rescored, finds what a full one finds."""
    k, v = vectors(4000)
    q = rows(4)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session(
            "s", SHAPE, CodecSpec(keys=Matryoshka(bits=4), values=Raw(), fit_tokens=512)
        )
        await session.append(k, v)
        exact = torch.einsum("thd,nhd->thn", q, k[0].float().repeat_interleave(3, dim=1)) * SHAPE.sm_scale
        found = [await session.score(0, q, precision=Precision(keys_level=level)) for level in range(4)]
        errors = [float((answer.logits - exact).norm()) for answer in found]
        assert errors == sorted(errors)
        best = await session.topk(0, q, 64)
        coarse = await session.topk(0, q, 64, oversampling=2, precision=Precision(keys_level=2))
        with pytest.raises(FailedPrecondition):
            await session.score(0, q, precision=Precision(keys_level=4, required=True))
    pairs = zip(best.positions.flatten(0, 1).tolist(), coarse.positions.flatten(0, 1).tolist(), strict=True)
    recall = [len(set(one) & set(other)) / 64 for one, other in pairs]
    assert sum(recall) / len(recall) >= 0.95


async def test_a_refined_attention_is_nearly_the_finest_one(tmp_path: Path) -> None:
    """A tenth of the tokens read finely takes away most of what a coarse pass gets wrong; all of them, everything."""
    k, v = vectors(2000)
    q = 8 * rows(4)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        spec = CodecSpec(keys=Matryoshka(bits=4), values=Matryoshka(bits=3), fit_tokens=512)
        session = await client.create_session("s", SHAPE, spec)
        await session.append(k[:, :800], v[:, :800])
        await session.append(k[:, 800:], v[:, 800:])
        level = Precision(keys_level=2, values_level=2)
        finest, coarse = await session.attend(0, q), await session.attend(0, q, precision=level)
        tenth, whole = [await session.attention(0, q, precision=level, refine=count) for count in (120, 1200)]
        with pytest.raises(InvalidArgument):
            await session.attend(0, q, refine=1 << 20)
    errors = [float((out - finest[0]).norm()) for out in (coarse[0], tenth.out)]
    assert errors[1] < errors[0] / 3
    torch.testing.assert_close(whole.out, finest[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.lse, finest[1], atol=1e-5, rtol=1e-5)
    assert tenth.fidelity.precision.keys_level == 2


async def test_a_fork_reads_with_its_parents_basis(tmp_path: Path) -> None:
    k, v = vectors(1200)
    q = rows()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        spec = CodecSpec(keys=Matryoshka(), values=Matryoshka(), fit_tokens=512)
        session = await client.create_session("parent", SHAPE, spec)
        await session.append(k[:, :800], v[:, :800])
        fork = await session.fork("child", end=700)
        await fork.append(k[:, 800:], v[:, 800:])
        mine, its = await session.attend(0, q, end=700), await fork.attend(0, q, end=700)
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
        assert (await session.fetch_sketches()).fit == (await fork.fetch_sketches()).fit


async def test_answers_say_how_many_of_their_positions_no_projection_was_calibrated_for(tmp_path: Path) -> None:
    k, v = vectors(1000)
    q = rows()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        sha256 = await client.put_projection(projection(max_position=900))
        made = codecs(sha256)
        for name, beyond in (("projection", (100, 100)), ("own basis, lent metric", (100, 100)), ("session", (0, 0)),
                             ("own means, lent basis", (100, 100)), ("mixed", (0, 100))):  # fmt: skip
            session = await client.create_session(name.replace(" ", "_").replace(",", ""), SHAPE, made[name])
            await session.append(k[:, :600], v[:, :600])
            await session.append(k[:, 600:], v[:, 600:])
            for layer in range(LAYERS):
                answers = [
                    (await session.attention(layer, q, end=end), await session.score(layer, q, end=end),
                     await session.topk(layer, q, 5, end=end, oversampling=2))
                    for end in (900, 1000)
                ]  # fmt: skip
                found = [{each.fidelity.positions_beyond for each in kinds} for kinds in answers]
                assert found == [{0}, {beyond[layer]}], (name, layer)
        late = await client.create_session("late", SHAPE, made["own basis, lent metric"])
        await late.append(k[:, :10], v[:, :10])
        await late.append(k[:, 10:510], v[:, 10:510])
        await late.append(k[:, 510:], v[:, 510:])
        assert (await late.attention(0, q)).fidelity.positions_beyond == 100
        exact = await client.create_session("exact", SHAPE, made["own basis, lent metric"])
        await exact.append(k[:, :300], v[:, :300])
        assert (await exact.attention(0, q)).fidelity.positions_beyond == 0


async def test_projections_are_kept_listed_and_given_back(tmp_path: Path) -> None:
    data = projection()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        sha256 = await client.put_projection(data)
        assert await client.put_projection(data) == sha256
        other = await client.put_projection(projection(metric=False))
        assert await client.get_projection(sha256) == data
        listed = await client.list_projections()
        assert sorted(each.sha256 for each in listed) == sorted([sha256, other])
        assert '"max_position":2000' in listed[0].header_json
        with pytest.raises(NotFound):
            await client.get_projection("0" * 64)
        with pytest.raises(InvalidArgument):
            await client.get_projection("../../etc/passwd")
        with pytest.raises(InvalidArgument, match="is no projection"):
            await client.put_projection(b"\x20" + bytes(7) + b"{" * 64)
    limits: dict[str, object] = {"projection_bytes_max": len(data) - 1}
    async with serving(tmp_path, limits=limits) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(InvalidArgument, match="at most"):
            await client.put_projection(data)
        assert len(await client.list_projections()) == 2
        assert await client.list_sessions() == []


async def test_a_session_needs_its_projection_and_one_of_its_model(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        codec = Matryoshka(basis=f"projection:{'0' * 64}")
        spec = CodecSpec(keys=codec, values=codec, mean="none")
        with pytest.raises(FailedPrecondition, match="there is no projection"):
            await client.create_session("s", SHAPE, spec)
        sha256 = await client.put_projection(projection(heads=1))
        with pytest.raises(FailedPrecondition, match="has kv_heads 1, the session 2"):
            await client.create_session("s", SHAPE, codecs(sha256)["projection"])
        plain = await client.put_projection(projection(metric=False))
        with pytest.raises(FailedPrecondition, match="has no metrics"):
            await client.create_session("s", SHAPE, codecs(plain)["own basis, lent metric"])
        assert await client.list_sessions() == []


async def test_a_damaged_projection_fails_its_sessions_only(tmp_path: Path) -> None:
    k, v = vectors(600)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        sha256 = await client.put_projection(projection())
        for name in ("projection", "session"):
            session = await client.create_session(name, SHAPE, codecs(sha256)[name])
            await session.append(k, v)
    file = tmp_path / "_projections" / f"{sha256}.safetensors"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    damaged = verify_store(LocalStore(tmp_path)).damaged
    assert [str(each) for each in damaged] == [f"_projections/{sha256}: projection {sha256} is damaged"]
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(DataLoss, match=r"projection .* is damaged"):
            await client.open_session("projection")
        assert (await client.open_session("session")).length == 600
        file.write_bytes(b"nothing")
        assert [(each.size_bytes, each.header_json) for each in await client.list_projections()] == [(7, "")]


async def test_the_basis_of_a_session_is_that_of_its_first_tokens(tmp_path: Path) -> None:
    """However they were split into appends, as long as the same append completes them."""
    k, v = vectors(700)
    spec = CodecSpec(keys=Matryoshka(), values=Matryoshka(), fit_tokens=600)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        fits = []
        for name, cuts in (("whole", [0, 700]), ("pieces", [0, 100, 400, 700])):
            session = await client.create_session(name, SHAPE, spec)
            for start, end in pairwise(cuts):
                await session.append(k[:, start:end], v[:, start:end])
            fits.append((await session.fetch_sketches()).fit)
            info = await session.info()
            assert info.fitted
            assert info.fit_fingerprint == plan_for(spec, SHAPE, fits[-1]).fingerprint
    assert fits[0] == fits[1]
