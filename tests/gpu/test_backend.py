"""The CUDA backend as the server uses it: over host rows, and over sessions whose pages it keeps."""

import pytest
import torch

pytest.importorskip("cupy", reason="CuPy is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from kvstore_codecs.resolve import plan_for
from kvstore_codecs.sketch import encode_kind
from kvstore_codecs.spec import Affine, AnyCodec, CodecSpec, Kind, ModelShape, Qjl, Raw, Rotated
from kvstore_kernels import Backend, DenseRows, SignRows, build
from kvstore_kernels.backend import ReferenceBackend
from kvstore_kernels.cuda.backend import CudaBackend, open_cuda
from kvstore_kernels.variance import ScoreNoise
from kvstore_server.memory.device import DeviceMemory
from kvstore_server.memory.resident import Block, Epoch, ResidentSession
from kvstore_server.scheduling.self_check import self_check
from kvstore_server.sessions import attention
from kvstore_server.sessions.model import Precision

pytestmark = pytest.mark.gpu
REFERENCE = ReferenceBackend()
LEVELS: dict[Kind, int] = {"keys": 0, "values": 0}
SINKS = 4
MIB = 1 << 20


@pytest.fixture(scope="module")
def backend() -> CudaBackend:
    return open_cuda("cuda:0")


def shape(head_dim: int = 128, heads: int = 2, group: int = 4) -> ModelShape:
    return ModelShape(
        layers=2, kv_heads=heads, query_heads=heads * group, head_dim=head_dim, dtype="float16", sm_scale=head_dim**-0.5
    )


def session(spec: CodecSpec, of: ModelShape, tokens: int, backend: CudaBackend) -> ResidentSession:
    resident = ResidentSession(of, backend.pinned)
    plan = plan_for(spec, of, None)
    resident.adopt([Epoch(SINKS, plan)])
    grow(resident, tokens)
    return resident


def grow(resident: ResidentSession, tokens: int) -> None:
    of, plan = resident.shape, resident.plan
    assert plan is not None
    exact = max(0, min(tokens, SINKS - resident.length))
    generator = torch.Generator().manual_seed(resident.length)
    rows = []
    for layer in range(of.layers):
        x = torch.randn(2, tokens, of.kv_heads, of.head_dim, generator=generator).half()
        keys, values = (
            encode_kind(x[i], plan.of(layer, kind), exact, REFERENCE) for i, kind in enumerate(("keys", "values"))
        )
        rows.append((keys, values))
    assert resident.extend(resident.length, rows, tokens)


def attended(backend: Backend, blocks: list[Block], q: torch.Tensor, debias: float = 0.5) -> list[torch.Tensor]:
    parts = [(block.keys, block.values) for block in blocks]
    scores: dict[str, float] = {"sm_scale": q.shape[2] ** -0.5, "logit_soft_cap": 0.0, "debias": debias}
    out, lse, _ = backend.attend_all(q, parts, **scores, noise=None, kept={})()
    return [out.float(), lse]


SPECS = {
    "qjl": CodecSpec(keys=Qjl(bits=256), values=Rotated(planes=2), mean="none", sink_tokens=SINKS),
    "rotated": CodecSpec(keys=Rotated(planes=4), values=Rotated(planes=4), mean="none", sink_tokens=SINKS),
    "affine": CodecSpec(keys=Rotated(planes=3), values=Affine(planes=2), mean="none", sink_tokens=SINKS),
    "raw": CodecSpec(keys=Raw(), values=Raw(), mean="none", sink_tokens=SINKS),
    "raw keys": CodecSpec(keys=Raw(), values=Rotated(planes=4), mean="none", sink_tokens=SINKS),
    "raw values": CodecSpec(keys=Rotated(planes=4), values=Raw(), mean="none", sink_tokens=SINKS),
}


def test_the_self_check_passes_and_finds_a_planted_fault(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    self_check(backend)
    right = CudaBackend.attend

    def off(self: CudaBackend, *args: object, **kwargs: object):
        out, lse = right(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        return out + 0.05, lse

    monkeypatch.setattr(CudaBackend, "attend", off)
    with pytest.raises(RuntimeError, match="off by"):
        self_check(backend)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("end", [3, 4, 5, 256, 257, 1000])
def test_attention_on_pages_is_the_references(backend: CudaBackend, name: str, end: int) -> None:
    resident = session(SPECS[name], shape(), 1000, backend)
    memory = DeviceMemory(backend, 64 * MIB, 16 * MIB)
    q = torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(9)).half()
    out, lse = attended(backend, memory.blocks(resident, 1, 0, end, LEVELS), q)
    expected_out, expected_lse = attended(REFERENCE, list(resident.blocks(1, 0, end, LEVELS)), q)
    assert (lse - expected_lse).abs().max() < 2e-3
    assert (out - expected_out).norm() / expected_out.norm() < 1.5e-2, "8-bit weights cost a hundredth at most"


@pytest.mark.parametrize("name", SPECS)
def test_scores_and_best_on_pages_are_the_references(backend: CudaBackend, name: str) -> None:
    resident = session(SPECS[name], shape(), 700, backend)
    memory = DeviceMemory(backend, 64 * MIB, 16 * MIB)
    q = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(9)).half()
    for block, host in zip(memory.blocks(resident, 0, 0, 700, LEVELS), resident.blocks(0, 0, 700, LEVELS), strict=True):
        scores = backend.score(q, block.keys, sm_scale=0.1)
        assert isinstance(host.keys, SignRows | DenseRows)
        expected = REFERENCE.score(q, host.keys, sm_scale=0.1)
        assert (backend.to_host((scores,))()[0] - expected).abs().max() < 1e-3
        positions, best = backend.to_host(backend.best(q, block.keys, 5, sm_scale=0.1))()
        assert torch.equal(scores.cpu().gather(2, positions), best)


@pytest.mark.parametrize("name", ["qjl", "rotated", "affine"])
def test_scores_at_positions_are_the_references(backend: CudaBackend, name: str) -> None:
    resident = session(SPECS[name], shape(), 700, backend)
    memory = DeviceMemory(backend, 64 * MIB, 16 * MIB)
    random = torch.Generator().manual_seed(9)
    q = torch.randn(2, 8, 128, generator=random).half()
    *_, block = memory.blocks(resident, 0, 0, 700, LEVELS)
    *_, host = resident.blocks(0, 0, 700, LEVELS)
    assert isinstance(host.keys, SignRows)
    positions = torch.randint(host.end - host.start, (2, 8, 40), generator=random)
    how = {"sm_scale": 0.1, "logit_soft_cap": 20.0}
    (found,) = backend.to_host((backend.score_at(q, block.keys, positions, **how),))()
    assert (found - REFERENCE.score_at(q, host.keys, positions, **how)).abs().max() < 1e-3


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_best_of_a_coarse_pass_are_the_references(backend: CudaBackend, level: int) -> None:
    resident = session(SPECS["rotated"], shape(), 3000, backend)
    prefix = attention.Prefix(resident, 0, 3000, Precision(keys_level=level))
    q = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(9)).half()
    on_device = attention.Device(backend, DeviceMemory(backend, 64 * MIB, 16 * MIB))
    with backend.ordered():
        positions, scores = attention.top_k(on_device, prefix, q, 32, 96)()
    expected = attention.top_k(attention.Device(REFERENCE, None), prefix, q, 32, 96)()
    assert (scores - expected[1]).abs().max() < 1e-3
    assert (positions == expected[0]).float().mean() > 0.98, "but for ties"


@pytest.mark.parametrize("end", [300, 301, 900, 1100, 3000])
def test_a_session_of_several_epochs_answers_as_the_reference(backend: CudaBackend, end: int) -> None:
    resident = session(SPECS["rotated"], shape(), 300, backend)
    for planes, start, last in ((2, 300, 900), (3, 900, 3000)):
        spec = CodecSpec(keys=Rotated(planes=planes), values=Rotated(planes=planes), mean="none", sink_tokens=SINKS)
        resident.adopt([*resident.epochs, Epoch(start, plan_for(spec, shape(), None))])
        grow(resident, last - start)
    on_device = attention.Device(backend, DeviceMemory(backend, 64 * MIB, 16 * MIB))
    on_host, q = (
        attention.Device(REFERENCE, None),
        torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(9)).half(),
    )
    prefix = attention.Prefix(resident, 1, end, Precision())
    assert on_device.memory is not None
    with backend.ordered():
        out, lse = attended(backend, on_device.blocks(prefix), q)
        (scores,) = attention.score(on_device, prefix, 0, q)()
        best = attention.top_k(on_device, attention.Prefix(resident, 1, end, Precision(keys_level=1)), q, 32, 96)()
    expected_out, expected_lse = attended(REFERENCE, on_host.blocks(prefix), q)
    assert (lse - expected_lse).abs().max() < 2e-3
    assert (out - expected_out).norm() / expected_out.norm() < 1.5e-2
    assert (scores - attention.score(on_host, prefix, 0, q)()[0]).abs().max() < 2e-3
    expected = attention.top_k(on_host, attention.Prefix(resident, 1, end, Precision(keys_level=1)), q, 32, 96)()
    assert (best[1] - expected[1]).abs().max() < 1e-3
    assert (best[0] == expected[0]).float().mean() > 0.98, "but for ties"


def test_a_session_that_grows_answers_as_one_that_came_whole(backend: CudaBackend) -> None:
    memory = DeviceMemory(backend, 64 * MIB, 16 * MIB)
    resident, q = session(SPECS["rotated"], shape(), 250, backend), torch.randn(1, 8, 128).half()
    for _ in range(12):
        out, lse = attended(backend, memory.blocks(resident, 0, 0, resident.length, LEVELS), q)
        fresh = DeviceMemory(backend, 64 * MIB, 16 * MIB)
        again = attended(backend, fresh.blocks(resident, 0, 0, resident.length, LEVELS), q)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])
        grow(resident, 1)


def test_a_streamed_session_answers_as_a_resident_one_bit_for_bit(backend: CudaBackend) -> None:
    resident, q = session(SPECS["rotated"], shape(), 6000, backend), torch.randn(1, 8, 128).half()
    kept = attended(backend, DeviceMemory(backend, 64 * MIB, 16 * MIB).blocks(resident, 0, 0, 6000, LEVELS), q)
    small = DeviceMemory(backend, 2 * MIB, 32 * MIB)
    streamed = attended(backend, small.blocks(resident, 0, 0, 6000, LEVELS), q)
    assert small.counts["streamed_layers"] == 1
    assert torch.equal(kept[0], streamed[0])
    assert torch.equal(kept[1], streamed[1])


def test_a_workers_rows_do_not_depend_on_those_beside_them(backend: CudaBackend) -> None:
    resident = session(SPECS["rotated"], shape(), 5000, backend)
    memory = DeviceMemory(backend, 64 * MIB, 16 * MIB)
    blocks = memory.blocks(resident, 0, 0, 5000, LEVELS)
    q = torch.randn(32, 8, 128, generator=torch.Generator().manual_seed(2)).half()
    together, together_lse = attended(backend, blocks, q)
    for first, count in ((0, 1), (3, 1), (7, 5), (16, 16), (31, 1)):
        out, lse = attended(backend, blocks, q[first : first + count])
        assert torch.equal(out, together[first : first + count])
        assert torch.equal(lse, together_lse[first : first + count])


def test_a_recording_answers_as_the_launches_it_stands_for(backend: CudaBackend) -> None:
    resident = session(SPECS["rotated"], shape(), 3000, backend)
    memory = DeviceMemory(backend, 64 * MIB, 16 * MIB)
    blocks = memory.blocks(resident, 0, 0, 3000, LEVELS)
    parts = [(block.keys, block.values) for block in blocks]
    scores: dict[str, float] = {"sm_scale": 0.1, "logit_soft_cap": 0.0, "debias": 0.5}
    noise = ScoreNoise(torch.rand(2, generator=torch.Generator().manual_seed(9)))
    for tokens in (1, 3, 4, 8):
        for run in range(5):
            q = torch.randn(tokens, 8, 128, generator=torch.Generator().manual_seed(run)).half()
            kept = backend.attend_all(q, parts, **scores, noise=noise, kept=blocks.kept)()
            fresh = backend.attend_all(q, parts, **scores, noise=noise, kept={})()
            assert kept[2] is not None
            assert fresh[2] is not None
            assert all(map(torch.equal, kept[:2], fresh[:2])), f"{tokens} rows, run {run}"
            torch.testing.assert_close(kept[2], fresh[2])
            torch.testing.assert_close(kept[2], noise.variance(q))
    assert memory.blocks(resident, 0, 0, 3000, LEVELS) is blocks
    grow(resident, 1)
    assert memory.blocks(resident, 0, 0, 3001, LEVELS) is not blocks
    assert memory.blocks(resident, 0, 0, 3000, LEVELS) is not blocks, "rows may have moved"


@pytest.mark.parametrize("name", ["qjl", "rotated", "affine"])
def test_levels_and_decoding_of_host_rows_are_the_references(backend: CudaBackend, name: str) -> None:
    of = shape()
    plan = plan_for(SPECS[name], of, None)
    x = torch.randn(300, 2, 128, generator=torch.Generator().manual_seed(1)).half()
    for kind in plan.keys[0], plan.values[0]:
        signs = REFERENCE.encode(x, kind.encoder)  # pyright: ignore[reportAttributeAccessIssue]
        for level in kind.levels:  # pyright: ignore[reportAttributeAccessIssue]
            rows = SignRows(signs, level)
            found = backend.to_host((backend.decode(rows, torch.float32),))()[0]
            assert (found - REFERENCE.decode(rows)).abs().max() < 1e-3


@pytest.mark.parametrize("codec", [Qjl(bits=256), Rotated(planes=4), Affine(planes=2)], ids=str)
def test_what_the_device_encodes_scores_as_what_the_cpu_encodes(backend: CudaBackend, codec: AnyCodec) -> None:
    spec = CodecSpec(keys=Rotated(planes=2), values=codec, mean="none", sink_tokens=SINKS)
    plan = plan_for(spec, shape(), None).values[0]
    x = torch.randn(2000, 2, 128, generator=torch.Generator().manual_seed(4)).half()
    ours = backend.encode(x, plan.encoder)  # pyright: ignore[reportAttributeAccessIssue]
    theirs = REFERENCE.encode(x, plan.encoder)  # pyright: ignore[reportAttributeAccessIssue]
    assert ours.words.device.type == "cpu"
    differing = (ours.words ^ theirs.words).ne(0).float().mean()
    assert differing < 0.05
    decoded = [REFERENCE.decode(SignRows(signs, plan.levels[0])) for signs in (ours, theirs)]  # pyright: ignore
    assert (decoded[0] - decoded[1]).norm() / decoded[1].norm() < 2e-2


def test_a_wrong_launch_is_fatal_and_out_of_memory_is_not(backend: CudaBackend) -> None:
    assert backend.is_fatal(build.DeviceError("launch failed"))
    with pytest.raises(torch.OutOfMemoryError) as full:
        backend.allocate(1 << 45)
    assert not backend.is_fatal(full.value)
