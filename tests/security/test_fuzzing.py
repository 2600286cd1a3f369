"""Ten thousand calls that are almost right, on a live server: it refuses each, and nobody else notices.

A case that is answered as it must not be is kept as a file; `pytest tests/security/test_fuzzing.py --replay FILE` plays
it alone, `--fuzz-seed N` makes the same cases again.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.artifact import write_projection
from kvstore_codecs.spec import RAW
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.rpc import convert
from kvstore_server.rpc.service import KVStoreServicer
from kvstore_server.storage.local import LocalStore

from ..codecs.spectra import projection
from ..faults.tally import WHOLE_SUITE, times
from ..running import ServerProcess, serving
from ..soak.gauges import memory_bytes
from .calling import METHODS
from .fuzzing import live
from .fuzzing.bystander import Bystander
from .fuzzing.cases import Case, Generator
from .fuzzing.live import BATCH, OPTIONS, Caller, Findings, play, stock_up
from .fuzzing.requests import STOCK, TOKENS

CASES = times(300, 10_000)
WARM_CASES = times(200, 1_000)
GROWTH_BYTES_MAX = 200 << 20
ENVIRONMENT = {"KVSTORE__IDENTITY__API_KEYS": "true", "KVSTORE__MERGE__OBJECTS_MIN": "null"}


class Round:
    """Cases on one server, with a look at the bystander after each batch. What finds something is kept in `folder`."""

    def __init__(self, fuzzer: Caller, bystander: Bystander, seed: int, folder: Path) -> None:
        self.fuzzer, self.bystander, self.seed, self.folder = fuzzer, bystander, seed, folder
        self.findings = Findings()

    async def prepare(self) -> None:
        await stock_up(self.fuzzer)
        await self.bystander.move_in()
        self._answers, self._objects = await self.bystander.answers(), self.bystander.objects()
        fetch = pb.FetchRequest(session="signs.0", token_start=TOKENS - 1, token_end=TOKENS)
        sketch = [pb.FetchResponse.FromString(each) for each in await self.fuzzer.must("Fetch", [fetch])]
        made = projection(32)
        file = write_projection(made.header, made.parts)
        await self.fuzzer.must("PutProjection", [pb.PutProjectionRequest(data=file)])
        self.generator = Generator(self.seed, sorted(METHODS), file, sketch)

    async def batch(self, cases: list[Case]) -> None:
        await stock_up(self.fuzzer)
        await play(self.fuzzer, cases, self.findings)
        try:
            assert await self.bystander.answers() == self._answers, "another tenant's answers differ"
            assert self.bystander.objects() == self._objects, "another tenant's objects differ"
        except AssertionError as error:
            files = " ".join(f"--replay {case.save(self.folder)}" for case in cases)
            error.add_note(f"found so far: {self.found()}; one of these did it: {files}")
            raise

    def found(self) -> list[str]:
        """What was found, each with the file that plays it again."""
        return [f"{what}: --replay {case.save(self.folder)}" for case, what in self.findings.complaints]


@asynccontextmanager
async def callers(target: str, tokens: tuple[str, str], data: Path) -> AsyncIterator[tuple[Caller, Bystander]]:
    with grpc.insecure_channel(target, options=OPTIONS) as channel:
        yield Caller(channel, tokens[0]), Bystander(Caller(channel, tokens[1]), data / "bystander")


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[str, str]:
    """Of an admin who sends nonsense, and of a bystander."""
    keys = KeyStore(LocalStore(tmp_path / "data"))
    return keys.create("fuzzer", "admin"), keys.create("bystander", "writer")


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    given = pytestconfig.getoption("fuzz_seed", None)
    seed = random.randrange(2**32) if given is None else given
    print(f"seed {seed}")
    return seed


async def answers_exactly(target: str, token: str) -> None:
    """A new session is read back bit for bit, and attention over it is that of float64."""
    shape, _ = STOCK["plain"]
    k, v = torch.randn(2, shape.layers, 300, shape.kv_heads, shape.head_dim, generator=torch.Generator().manual_seed(1))
    q = torch.randn(3, shape.query_heads, shape.head_dim, generator=torch.Generator().manual_seed(2))
    async with AsyncKVStoreClient(target, api_key=token) as client:
        session = await client.create_session("afterwards", shape, RAW)
        await session.append(k, v)
        fetched = await session.fetch()
        assert torch.equal(fetched[0], k)
        assert torch.equal(fetched[1], v)
        out, lse = await session.attend(1, q)
    keys, values = (x[1].double().repeat_interleave(2, dim=1) for x in (k, v))
    logits = torch.einsum("thd,nhd->thn", q.double(), keys) * shape.sm_scale
    torch.testing.assert_close(out.double(), torch.einsum("thn,nhd->thd", logits.softmax(2), values), atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), logits.logsumexp(2), atol=1e-5, rtol=0)


def tracebacks(server: ServerProcess) -> list[str]:
    return [line.strip() for line in server.lines if "Traceback" in line or "incident" in line or "never retr" in line]


@pytest.mark.slow
async def test_no_call_breaks_the_server_or_changes_what_another_tenant_has(
    tmp_path: Path,
    tokens: tuple[str, str],
    seed: int,
    pytestconfig: pytest.Config,
    record_property: Callable[..., None],
) -> None:
    server = ServerProcess(tmp_path / "data", env=ENVIRONMENT)
    try:
        async with callers(server.target, tokens, tmp_path / "data") as (fuzzer, bystander):
            work = Round(fuzzer, bystander, seed, tmp_path / "cases")
            await work.prepare()
            replay = pytestconfig.getoption("replay", None)
            numbers = [] if replay else range(CASES)
            warm = 0
            for first in range(0, len(numbers), BATCH):
                await work.batch([work.generator.case(n) for n in numbers[first : first + BATCH]])
                warm = memory_bytes(server.pid, "VmHWM") if first < WARM_CASES else warm
                if not (first + BATCH) % 1_000:
                    print(f"fuzzed calls: {first + BATCH:,} of {CASES:,}", flush=True)
            for path in replay or ():
                await work.batch([Case.load(Path(path))])
            assert server.running
        await answers_exactly(server.target, tokens[0])
        growth = memory_bytes(server.pid, "VmHWM") - warm if warm else 0
    finally:
        code = server.terminate() if server.running else "gone"
    record_property("what", "fuzzed calls")
    record_property("cases", work.findings.cases)
    print(f"{work.findings.cases:,} calls, peak memory {growth / 2**20:+.0f} MiB since the first {WARM_CASES}")
    print("\n".join(f"{method}: {dict(codes)}" for method, codes in sorted(work.findings.codes.items())))
    (tmp_path / "log").write_text("".join(server.lines))
    assert work.found() == []
    assert tracebacks(server) == []
    assert code == 0
    assert growth < GROWTH_BYTES_MAX
    if WHOLE_SUITE and not replay:
        assert_not_in_vain(work.findings)


def assert_not_in_vain(findings: Findings) -> None:
    """Every method was let in and refused, and most ways to be refused were met."""
    for method, codes in findings.codes.items():
        assert codes["OK"], f"{method} never succeeded: {codes}"
        assert len(codes) > 1, f"{method} never failed: {codes}"
    everything = sum(findings.codes.values(), Counter[str]())
    assert everything.keys() >= {"INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "ABORTED"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a bug", "a hang", "another tenant's session", "a bare error"])
async def test_a_fault_is_found_and_its_case_plays_again(
    tmp_path: Path, tokens: tuple[str, str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    _plant(fault, monkeypatch)
    monkeypatch.setattr(live, "SECONDS_MAX", 2.0)
    async with (
        serving(tmp_path / "data", identity={"api_keys": True}) as server,
        callers(f"127.0.0.1:{server.port}", tokens, tmp_path / "data") as (fuzzer, bystander),
    ):
        work = Round(fuzzer, bystander, 3, tmp_path / "cases")
        await work.prepare()
        cases = [work.generator.case(number) for number in range(len(METHODS) * 40)]
        if fault == "another tenant's session":
            with pytest.raises(AssertionError, match=r"another tenant|NOT_FOUND"):
                await work.batch([case for case in cases if case.method == "DeleteSession"])
            return
        await work.batch([case for case in cases if case.method in ("Score", "TopK", "GetSession")])
        found = work.found()
        assert found
        again = Case.load(Path(found[0].rpartition(" ")[2]))
        work.findings.complaints.clear()
        await work.batch([again])
        assert work.findings.complaints[0][0] == again


def _plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a mutated request meets, in the server."""
    get, delete, precision = KVStoreServicer.GetSession, KVStoreServicer.DeleteSession, convert.precision_from

    async def hang(self: KVStoreServicer, request: Any, call: Any) -> Any:
        if not request.name.isascii() or len(request.name) > 100 or not request.name:
            await asyncio.sleep(60)
        return await get(self, request, call)

    async def foreign(self: KVStoreServicer, request: Any, call: Any) -> Any:
        if request.HasField("generation"):
            object.__setattr__(call, "caller", type(call.caller)("bystander", "admin", "x"))
            request = pb.DeleteSessionRequest(name="plain.0")
        return await delete(self, request, call)

    def narrow(message: pb.Precision) -> Any:
        return precision(pb.Precision(keys_level=bytes([message.keys_level])[0], values_level=message.values_level))

    if fault == "a bug":
        monkeypatch.setattr(convert, "precision_from", narrow)
    elif fault == "a hang":
        monkeypatch.setattr(KVStoreServicer, "GetSession", hang)
    elif fault == "a bare error":
        monkeypatch.setattr("kvstore_server.rpc.status.trailers_of", lambda status: ())
    else:
        monkeypatch.setattr(KVStoreServicer, "DeleteSession", foreign)


def test_the_same_seed_makes_the_same_cases(tmp_path: Path) -> None:
    one, two = (Generator(5, sorted(METHODS), b"projection", []) for _ in range(2))
    cases = [one.case(number) for number in range(200)]
    assert cases == [two.case(number) for number in range(200)]
    assert Case.load(cases[7].save(tmp_path)) == cases[7]
    assert os.listdir(tmp_path) == [f"00007-{cases[7].method}.json"]
    assert Counter(case.what for case in cases).keys() == {"valid", "fields", "bytes", "stream"}
