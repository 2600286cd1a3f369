import logging

import pytest
import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient, CodecSpec, InvalidArgument, LayerOverride, Session, sketching
from kvstore_client.tensors import to_proto
from kvstore_codecs.plan import CodecPlan, Fit
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.sketch import encode_kind
from kvstore_codecs.spec import KINDS, Affine, Qjl, Raw, Rotated
from kvstore_kernels.backend import ReferenceBackend
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .inputs import SHAPE, AppendLog, block
from .scripted import Call, Failure, ScriptedServer

CODEC = CodecSpec(
    keys=Rotated(planes=2),
    values=Affine(planes=2),
    overrides=(LayerOverride(layers=(0,), values=Raw()),),
    sink_tokens=2,
    fit_tokens=6,
)


class FittingSession(AppendLog):
    """A session that fits itself with the append that brings it to eight tokens, and takes sketches from then on."""

    def __init__(self, server: ScriptedServer, codec: CodecSpec = CODEC) -> None:
        super().__init__()
        self.codec, self.plan, self.exact_end = codec, None if codec.needs_fit else plan_for(codec, SHAPE, None), 0
        server.always("GetServerInfo", inputs.server_info(append_tokens_max=8))
        server.always("GetSession", self.get)
        server.always("Fetch", self.fetch)
        server.always("Append", self)

    @property
    def fingerprint(self) -> str:
        return self.plan.fingerprint if self.plan else ""

    async def get(self, _: Call) -> pb.GetSessionResponse:
        facts = {"fitted": self.plan is not None, "exact_end": self.exact_end, "fit_fingerprint": self.fingerprint}
        return pb.GetSessionResponse(session=inputs.session(length=self.length, codec=self.codec, **facts))

    async def fetch(self, _: Call) -> list[pb.FetchResponse]:
        assert self.plan is not None
        assert self.plan.fit is not None
        fit = self.plan.fit
        header = pb.FetchHeader(
            session=inputs.session(exact_end=self.exact_end),
            mean_keys=to_proto(fit.mean_keys),
            mean_values=to_proto(fit.mean_values),
            fit_token_start=fit.token_start,
            fit_token_end=fit.token_end,
        )
        return [pb.FetchResponse(header=header)]

    async def __call__(self, call: Call) -> pb.AppendResponse:
        header = call.requests[0].header
        if header.encoding == pb.ENCODING_SKETCH and header.fit_fingerprint != self.fingerprint:
            raise Failure("FAILED_PRECONDITION", reason="NOT_THIS_FIT")
        reply = await super().__call__(call)
        if self.plan is None and self.length >= 8:
            self.fit(header.start)
        return reply

    def fit(self, start: int) -> None:
        rows = [torch.stack([self.stored(layer, kind)[2:] for layer in range(2)]) for kind in (1, 2)]  # type: ignore[arg-type]
        self.plan = plan_for(self.codec, SHAPE, Fit.from_rows(rows[0], rows[1], 2))
        self.exact_end = max(2, start)

    @property
    def encodings(self) -> list[tuple[int, int, int]]:
        """(start, tokens, encoding) of what is stored."""
        return [(start, tokens, encoding) for start, (tokens, encoding, _) in sorted(self.commits.items())]


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled operations make the same bytes, but take seconds to load."""
    monkeypatch.setattr(sketching, "cpu_backend", ReferenceBackend)


RAW, SKETCH = pb.ENCODING_RAW, pb.ENCODING_SKETCH


@pytest.fixture
def fitting(server: ScriptedServer) -> FittingSession:
    return FittingSession(server)


@pytest.fixture
async def session(client: AsyncKVStoreClient, fitting: FittingSession) -> Session:
    return await client.open_session("book")


def expected(x: Tensor, plan: CodecPlan, layer: int, kind: int, exact: int) -> dict[int, bytes]:
    rows = encode_kind(x, plan.of(layer, KINDS[kind - 1]), exact, ReferenceBackend())
    parts = {pb.PART_ROWS: rows.rows}
    if rows.signs is not None:
        parts |= {pb.PART_WORDS: rows.signs.words, pb.PART_SCALES: rows.signs.scales}
    return {int(part): tensor.numpy().tobytes() for part, tensor in parts.items() if tensor.numel()}


async def test_vectors_go_before_the_fit_and_sketches_after_it(session: Session, fitting: FittingSession):
    k, v = block(20)
    assert await session.append(k, v, encode=True) == 20
    assert fitting.encodings == [(0, 8, RAW), (8, 8, SKETCH), (16, 4, SKETCH)]
    assert fitting.plan is not None
    for start, tokens in ((8, 8), (16, 4)):
        data = fitting.commits[start][2]
        for layer in (0, 1):
            for kind, x in ((pb.KIND_KEYS, k), (pb.KIND_VALUES, v)):
                found = {part: data[layer, kind, part] for part in (1, 2, 3) if (layer, kind, part) in data}
                assert found == expected(x[layer, start : start + tokens], fitting.plan, layer, kind, exact=0)


async def test_exact_tokens_go_as_rows_and_sketches_count_from_the_append_s_start(
    server: ScriptedServer, client: AsyncKVStoreClient
):
    codec = CodecSpec(keys=Rotated(planes=1), values=Raw(), mean="none", sink_tokens=3)
    fitting = FittingSession(server, codec)
    fitting.exact_end = 3
    session = await client.open_session("book")
    k, v = block(5)
    await session.append(k, v, encode=True)
    frames = [request.frame for request in server.of("Append")[0].requests[1:]]
    places = [(f.layer, f.kind, f.part, f.token_offset, f.tokens) for f in frames]
    one = [(1, pb.PART_ROWS, 0, 3), (1, pb.PART_WORDS, 3, 2), (1, pb.PART_SCALES, 3, 2), (2, pb.PART_ROWS, 0, 5)]
    assert places == [(layer, *place) for layer in (0, 1) for place in one]
    assert frames[0].data == k[0, :3].numpy().tobytes()


async def test_without_encode_vectors_go_even_after_the_fit(
    server: ScriptedServer, session: Session, fitting: FittingSession
):
    await session.append(*block(12))
    assert fitting.encodings == [(0, 8, RAW), (8, 4, RAW)]
    assert server.of("Fetch") == []


async def test_the_fit_is_fetched_once(server: ScriptedServer, session: Session, fitting: FittingSession):
    for seed in range(5):
        await session.append(*block(8, seed=seed), encode=True)
    assert len(server.of("Fetch")) == 1
    assert len(server.of("GetSession")) == 2


async def test_a_machine_with_another_codec_sends_vectors_and_says_so_once(
    session: Session, fitting: FittingSession, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FittingSession, "fingerprint", "of another machine")
    with caplog.at_level(logging.WARNING, "kvstore_client"):
        await session.append(*block(20), encode=True)
    assert [encoding for _, _, encoding in fitting.encodings] == [RAW] * 3
    assert len(caplog.records) == 1


async def test_a_new_fit_at_the_server_costs_the_pieces_under_way_as_vectors(session: Session, fitting: FittingSession):
    await session.append(*block(16), encode=True)
    assert fitting.plan is not None
    fitting.plan = plan_for(CODEC, SHAPE, Fit(torch.ones(2, 2, 32), torch.ones(2, 2, 32), 2, 16))
    await session.append(*block(16, seed=1), encode=True)
    await session.append(*block(8, seed=2), encode=True)
    assert [encoding for _, _, encoding in fitting.encodings] == [RAW, SKETCH, RAW, RAW, SKETCH]


async def test_a_replay_recognises_what_was_sent_as_vectors_and_as_sketches(session: Session, fitting: FittingSession):
    k, v = block(20)
    await session.append(k, v, encode=True)
    before = fitting.encodings
    assert await session.append(k, v, start=0, encode=True) == 20
    assert fitting.encodings == before


async def test_what_cannot_be_encoded_is_refused_by_its_place(session: Session, fitting: FittingSession):
    await session.append(*block(8))
    k, v = block(4)
    k[1, 3, 1, 7] = torch.nan
    with pytest.raises(InvalidArgument, match="k: layer 1: NaN or Inf at token 3, KV head 1") as caught:
        await session.append(k, v, encode=True)
    assert (caught.value.facts["layer"], caught.value.facts["token"]) == ("1", "3")
    assert session.length == 8


async def test_sketches_larger_than_the_vectors_stay_at_the_server(server: ScriptedServer, client: AsyncKVStoreClient):
    fitting = FittingSession(server, CodecSpec(keys=Qjl(bits=1024), values=Raw(), mean="none", sink_tokens=0))
    session = await client.open_session("book")
    await session.append(*block(4), encode=True)
    assert fitting.encodings == [(0, 4, RAW)]
