import pytest
import torch

from kvstore_client import Internal, InvalidArgument, Precision, Session
from kvstore_client.tensors import from_proto, to_proto
from kvstore_codecs.plan import Fit
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .inputs import SHAPE, query
from .scripted import Failure, ScriptedServer


def scores(start: int, tokens: int) -> pb.ScoreResponse:
    logits = torch.arange(start, start + tokens, dtype=torch.float32).expand(1, 4, tokens)
    return pb.ScoreResponse(
        token_start=start, scores=to_proto(logits), fidelity=pb.Fidelity(codec="qjl", score_stderr=0.5)
    )


async def test_scores_are_joined_in_order(server: ScriptedServer, session: Session):
    server.will("Score", [scores(2, 3), scores(5, 5)])
    found = await session.score(1, query(), start=2, precision=Precision(keys_level=1, required=True))
    assert torch.equal(found.logits, torch.arange(2.0, 10).expand(1, 4, 8))
    assert (found.start, found.fidelity.codec, found.fidelity.score_stderr) == (2, "qjl", 0.5)
    request = server.of("Score")[0].request
    assert (request.session, request.generation, request.layer) == ("book", "1", 1)
    assert (request.token_start, request.token_end) == (2, 10)
    assert (request.precision.keys_level, request.precision.require_precision) == (1, True)


@pytest.mark.parametrize("parts", [[(0, 4), (5, 5)], [(0, 4)], [(0, 4), (4, 7)], []])
async def test_scores_with_a_hole_or_an_excess_are_an_error(
    server: ScriptedServer, session: Session, parts: list[tuple[int, int]]
):
    server.will("Score", [scores(*part) for part in parts])
    with pytest.raises(Internal):
        await session.score(0, query())


async def test_a_score_stream_that_breaks_is_asked_for_again_whole(server: ScriptedServer, session: Session):
    server.will("Score", [scores(0, 4), Failure("UNAVAILABLE")], [scores(0, 10)])
    assert (await session.score(0, query())).logits.shape == (1, 4, 10)


async def test_a_range_outside_the_prefix_is_refused_here(session: Session):
    with pytest.raises(InvalidArgument, match=r"start: 11 is outside \[0, 10\]"):
        await session.score(0, query(), start=11)


async def test_topk_gives_positions_and_logits(server: ScriptedServer, session: Session):
    positions = torch.arange(12).reshape(1, 4, 3)
    logits = torch.randn(1, 4, 3)
    reply = pb.TopKResponse(positions=to_proto(positions), scores=to_proto(logits), fidelity=pb.Fidelity(exact=True))
    server.will("TopK", reply, reply)
    found = await session.topk(0, query(), 3, end=7)
    assert torch.equal(found.positions, positions)
    assert torch.equal(found.logits, logits)
    assert (found.end, found.fidelity.exact) == (7, True)
    await session.topk(0, query(), 3, oversampling=4.0)
    plain, rescored = (call.request for call in server.of("TopK"))
    assert (plain.end, plain.k, plain.rescore) == (7, 3, False)
    assert (rescored.end, rescored.rescore, rescored.oversampling) == (10, True, 4.0)


async def test_topk_of_fewer_tokens_than_k_has_them_all(server: ScriptedServer, session: Session):
    short = pb.TopKResponse(
        positions=to_proto(torch.zeros(1, 4, 2, dtype=torch.int64)), scores=to_proto(torch.zeros(1, 4, 2))
    )
    server.will("TopK", short, short)
    assert (await session.topk(0, query(), 5, end=2)).positions.shape == (1, 4, 2)
    with pytest.raises(Internal, match="shape"):
        await session.topk(0, query(), 5, end=4)


def part(layer: int, kind: "pb.Kind.ValueType", what: "pb.Part.ValueType", start: int, tensor: torch.Tensor):
    found = pb.FetchPart(layer=layer, kind=kind, part=what, token_start=start, tensor=to_proto(tensor))
    return pb.FetchResponse(part=found)


def header(**more: object) -> pb.FetchResponse:
    return pb.FetchResponse(header=pb.FetchHeader(session=inputs.session(exact_end=4), **more))  # type: ignore[arg-type]


async def test_fetched_vectors_are_joined_and_stacked_by_layer(server: ScriptedServer, session: Session):
    k, v = inputs.block(6)
    replies = [header()]
    for layer in (1, 0):
        replies += [part(layer, pb.KIND_KEYS, pb.PART_ROWS, 2 + a, k[layer, a:b]) for a, b in ((0, 4), (4, 6))]
        replies += [part(layer, pb.KIND_VALUES, pb.PART_ROWS, 2, v[layer])]
    server.will("Fetch", replies)
    keys, values = await session.fetch(layers=[1, 0], start=2, end=8)
    assert torch.equal(keys, k.flip(0))
    assert torch.equal(values, v.flip(0))
    request = server.of("Fetch")[0].request
    assert (list(request.layers), request.decoded, request.dtype) == ([1, 0], True, pb.DTYPE_FLOAT16)


async def test_vectors_may_be_asked_for_in_another_dtype(server: ScriptedServer, session: Session):
    rows = torch.zeros(10, 2, 32)
    kinds = (pb.KIND_KEYS, pb.KIND_VALUES)
    server.will("Fetch", [header(), *(part(0, kind, pb.PART_ROWS, 0, rows) for kind in kinds)])
    keys, _ = await session.fetch(layers=[0], dtype=torch.float32)
    assert keys.dtype == torch.float32
    with pytest.raises(InvalidArgument, match=r"dtype: torch\.float64"):
        await session.fetch(dtype=torch.float64)


async def test_sketches_come_with_the_exact_rows_before_them_and_the_fit(server: ScriptedServer, session: Session):
    fit = Fit(torch.randn(2, 2, 32), torch.randn(2, 2, 32), 4, 260)
    rows, words = torch.randn(3, 2, 32).half(), torch.randint(-(2**31), 2**31, (5, 8)).int()
    scales, dense = torch.randn(5, 2).half(), torch.randn(8, 2, 32).half()
    means = {"mean_keys": to_proto(fit.mean_keys), "mean_values": to_proto(fit.mean_values)}
    server.will(
        "Fetch",
        [
            header(fit_token_start=4, fit_token_end=260, **means),
            part(0, pb.KIND_KEYS, pb.PART_ROWS, 1, rows),
            part(0, pb.KIND_KEYS, pb.PART_WORDS, 4, words[:2]),
            part(0, pb.KIND_KEYS, pb.PART_SCALES, 4, scales[:2]),
            part(0, pb.KIND_KEYS, pb.PART_WORDS, 6, words[2:]),
            part(0, pb.KIND_KEYS, pb.PART_SCALES, 6, scales[2:]),
            part(0, pb.KIND_VALUES, pb.PART_ROWS, 1, dense),
        ],
    )
    found = await session.fetch_sketches(layers=[0], start=1, end=9)
    assert (found.start, found.end, found.exact_end, found.fit) == (1, 9, 4, fit)
    keys, values = found.parts[0, "keys"], found.parts[0, "values"]
    assert keys.signs is not None
    assert torch.equal(keys.rows, rows)
    assert torch.equal(keys.signs.words, words)
    assert torch.equal(keys.signs.scales, scales)
    assert torch.equal(values.rows, dense)
    assert values.signs is None
    assert not server.of("Fetch")[0].request.decoded


@pytest.mark.parametrize(
    "parts",
    [
        [(pb.PART_ROWS, 0, 9)],
        [(pb.PART_ROWS, 1, 10)],
        [(pb.PART_ROWS, 0, 4), (pb.PART_WORDS, 5, 6), (pb.PART_SCALES, 4, 6)],
        [(pb.PART_ROWS, 0, 4), (pb.PART_WORDS, 4, 6), (pb.PART_SCALES, 4, 5)],
        [(pb.PART_WORDS, 0, 10)],
        [(pb.PART_ROWS, 11, 1)],
        [],
    ],
)
async def test_a_fetch_with_missing_tokens_is_an_error(
    server: ScriptedServer, session: Session, parts: list[tuple["pb.Part.ValueType", int, int]]
):
    made = {
        pb.PART_ROWS: lambda n: torch.zeros(n, 2, 32).half(),
        pb.PART_WORDS: lambda n: torch.zeros(n, 8).int(),
        pb.PART_SCALES: lambda n: torch.zeros(n, 2).half(),
    }
    replies = [part(0, kind, what, at, made[what](n)) for kind in (1, 2) for what, at, n in parts]  # type: ignore[arg-type]
    server.will("Fetch", [header(), *replies])
    with pytest.raises(Internal):
        await session.fetch_sketches(layers=[0])


async def test_prefetch_names_the_prefix_and_returns_its_bytes(server: ScriptedServer, session: Session):
    server.will("Prefetch", pb.PrefetchResponse(resident_bytes=77))
    assert await session.prefetch() == 77
    request = server.of("Prefetch")[0].request
    assert (request.session, request.generation, request.end) == ("book", "1", 10)


async def test_a_query_is_sent_in_its_own_dtype(server: ScriptedServer, session: Session):
    server.will("Score", [scores(0, 10)])
    q = query().bfloat16()
    await session.score(0, q)
    assert torch.equal(from_proto(server.of("Score")[0].request.q), q)
    assert SHAPE.dtype == "float16"
