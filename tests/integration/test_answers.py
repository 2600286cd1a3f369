"""What queries answer: against dense attention, for every codec, whatever was appended how."""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient, FailedPrecondition, Precision, Session
from kvstore_codecs.spec import RAW, Affine, CodecSpec, LayerOverride, ModelShape, Qjl, Raw, Rotated
from kvstore_kernels import merge_states

from ..running import serving

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=6, head_dim=64, dtype="float32", sm_scale=0.125)
CODECS = {
    "raw": RAW,
    "rotated": CodecSpec(keys=Rotated(planes=4), values=Rotated(planes=4)),
    "qjl": CodecSpec(keys=Qjl(bits=256, outlier_channels=(3,)), values=Affine(planes=4)),
    "mixed": CodecSpec(
        keys=Rotated(planes=3), values=Raw(), overrides=(LayerOverride(layers=(-1,), keys=Raw(), values=Affine()),)
    ),
    "no mean": CodecSpec(keys=Rotated(planes=4), values=Rotated(planes=4), mean="none"),
}


def vectors(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, tokens, 2, 64, generator=made) + torch.randn(2, 2, 1, 2, 64, generator=made)
    return k, v


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] over k, v [N, H, D]: out and natural-log lse, float64."""
    keys, values = (x.double().repeat_interleave(3, dim=1) for x in (k, v))
    logits = torch.einsum("thd,nhd->thn", q.double(), keys) * SHAPE.sm_scale
    return torch.einsum("thn,nhd->thd", logits.softmax(2), values), logits.logsumexp(2)


def rows(tokens: int = 3) -> Tensor:
    return torch.randn(tokens, 6, 64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", CODECS)
async def test_attention_is_that_over_the_vectors_that_fetch_decodes(tmp_path: Path, name: str) -> None:
    """The estimators and the decoder read the same stored bits: with no debias they must agree."""
    k, v = vectors(700)
    q = rows()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE, CODECS[name])
        await session.append(k, v)
        decoded = await session.fetch()
        for layer in range(2):
            for end in (0, 1, 4, 5, 256, 700):
                out, lse = await session.attend(layer, q, end=end, debias=0.0)
                if not end:
                    assert not out.any()
                    assert torch.isneginf(lse).all()
                    continue
                expected = dense(q, decoded[0][layer, :end], decoded[1][layer, :end])
                torch.testing.assert_close(out.double(), expected[0], atol=2e-2, rtol=0)
                torch.testing.assert_close(lse.double(), expected[1], atol=2e-2, rtol=0)
    assert torch.equal(decoded[0][:, :4], k[:, :4]) or CODECS[name].sink_tokens == 0
    if name == "raw":
        assert torch.equal(decoded[0], k)
        assert torch.equal(decoded[1], v)


async def test_raw_attention_is_exact(tmp_path: Path) -> None:
    k, v = vectors(900)
    q = rows()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE, RAW)
        await session.append(k, v)
        answer = await session.attention(1, q)
    out, lse = dense(q, k[1], v[1])
    torch.testing.assert_close(answer.out.double(), out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(answer.lse.double(), lse, atol=1e-6, rtol=1e-5)
    assert answer.fidelity.exact
    assert answer.fidelity.score_stderr == 0


async def test_an_answer_does_not_depend_on_its_batch_its_framing_or_who_encoded(tmp_path: Path) -> None:
    k, v = vectors(900)
    q = rows(5)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        server_made = await client.create_session("server", SHAPE, CODECS["rotated"])
        client_made = await client.create_session("client", SHAPE, CODECS["rotated"])
        for session, encode in ((server_made, False), (client_made, True)):
            await session.append(k[:, :400], v[:, :400])
            await session.append(k[:, 400:], v[:, 400:], encode=encode)
        together = await server_made.attend(1, q)
        alone = [await client_made.attend(1, q[row : row + 1]) for row in range(5)]
        half = await server_made.attend(1, q[:, 3:], head_offset=3)
        many = await asyncio.gather(*(server_made.attend(1, q) for _ in range(16)))
        both = [await session.fetch(dtype=torch.float32) for session in (server_made, client_made)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    for out, lse in (
        (torch.cat([o for o, _ in alone]), torch.cat([x for _, x in alone])),
        (torch.cat([together[0][:, :3], half[0]], 1), torch.cat([together[1][:, :3], half[1]], 1)),
        *many,
    ):
        torch.testing.assert_close(out, together[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lse, together[1], atol=1e-6, rtol=1e-6)


async def test_scores_and_top_k_agree_and_levels_get_coarser(tmp_path: Path) -> None:
    k, v = vectors(1500)
    q = rows(1)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE, CODECS["rotated"])
        await session.append(k, v)
        scores = (await session.score(0, q)).logits
        part = await session.score(0, q, start=100, end=200)
        best = await session.topk(0, q, 10)
        coarse = [await session.score(0, q, precision=Precision(keys_level=level)) for level in range(4)]
        rescored = await session.topk(0, q, 10, oversampling=4, precision=Precision(keys_level=1))
        with pytest.raises(FailedPrecondition):
            await session.topk(0, q, 10, precision=Precision(keys_level=4, required=True))
    assert torch.equal(part.logits, scores[:, :, 100:200])
    values, positions = scores.sort(dim=2, descending=True, stable=True)
    assert torch.equal(best.positions, positions[:, :, :10])
    assert torch.equal(best.logits, values[:, :, :10])
    exact = torch.einsum("thd,nhd->thn", q, k[0].repeat_interleave(3, dim=1)) * SHAPE.sm_scale
    errors = [float((answer.logits - exact).norm()) for answer in coarse]
    assert errors == sorted(errors)
    stderrs = [answer.fidelity.score_stderr for answer in coarse]
    assert stderrs == sorted(stderrs)
    assert 0.5 < stderrs[0] / float((scores - exact).std()) < 2
    assert torch.equal(rescored.logits, scores.gather(2, rescored.positions))
    assert len(set(rescored.positions[0, 0].tolist()) & set(best.positions[0, 0].tolist())) >= 9


async def test_two_sessions_merge_as_one(tmp_path: Path) -> None:
    k, v = vectors(600)
    q = rows()
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        halves: list[Session] = []
        for name, tokens in (("left", slice(0, 350)), ("right", slice(350, 600))):
            halves.append(await client.create_session(name, SHAPE, RAW))
            await halves[-1].append(k[:, tokens], v[:, tokens])
        out, lse = merge_states([await half.attend(0, q) for half in halves])
    expected = dense(q, k[0], v[0])
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=0)


async def test_what_does_not_fit_in_memory_is_read_again(tmp_path: Path) -> None:
    k, v = vectors(2000)
    q = rows()
    memory: dict[str, object] = {"host_bytes_max": 64 << 20}
    async with serving(tmp_path, memory=memory) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        server.sessions.registry._host_bytes_max = 1 << 20
        sessions = [await client.create_session(f"s{i}", SHAPE, RAW) for i in range(3)]
        for session in sessions:
            await session.append(k, v)
        for _ in range(2):
            for session in sessions:
                out, _ = await session.attend(0, q)
                torch.testing.assert_close(out.double(), dense(q, k[0], v[0])[0], atol=1e-5, rtol=0)
                assert server.sessions.registry.resident_sessions == 1
