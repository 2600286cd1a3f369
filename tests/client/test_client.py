from collections.abc import Awaitable, Callable

import pytest
import torch

from kvstore_client import (
    Aborted,
    AlreadyExists,
    AsyncKVStoreClient,
    Internal,
    NotFound,
    PrefixMatch,
    ProjectionInfo,
    Session,
    TokenChain,
)
from kvstore_client.info import shape_from, shape_to
from kvstore_codecs.spec import DEFAULT, RAW
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .attending import Attending
from .inputs import SHAPE, AppendLog, block, query
from .scripted import SERVICE, Failure, ScriptedServer


async def test_a_session_is_created_with_its_shape_and_codec(server: ScriptedServer, client: AsyncKVStoreClient):
    made = inputs.session(length=0, codec=DEFAULT, ttl_seconds=60.0, pinned=True)
    server.will("CreateSession", pb.CreateSessionResponse(session=made))
    session = await client.create_session("book", SHAPE, DEFAULT, ttl_seconds=60, pinned=True)
    request = server.calls[0].request
    assert (request.name, request.ttl_seconds, request.pinned) == ("book", 60, True)
    assert shape_from(request.shape) == SHAPE
    assert DEFAULT.model_validate_json(request.codec_json) == DEFAULT
    assert (session.name, session.generation, session.length, session.shape) == ("book", "1", 0, SHAPE)


async def test_what_is_not_said_is_left_to_the_server(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("CreateSession", pb.CreateSessionResponse(session=inputs.session(length=5), already_present=True))
    session = await client.create_session("book", SHAPE)
    request = server.calls[0].request
    assert not request.HasField("codec_json")
    assert not request.HasField("ttl_seconds")
    assert session.length == 5, "the same session was there already"


async def test_a_name_taken_by_another_spec_is_already_exists(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("CreateSession", Failure("ALREADY_EXISTS"))
    with pytest.raises(AlreadyExists):
        await client.create_session("book", SHAPE, RAW)


async def test_opening_what_is_not_there_is_not_found(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("GetSession", Failure("NOT_FOUND"))
    with pytest.raises(NotFound):
        await client.open_session("book")


async def test_listing_follows_pages_and_stops_at_the_limit(server: ScriptedServer, client: AsyncKVStoreClient):
    pages = [
        pb.ListSessionsResponse(sessions=[inputs.session(f"s{n}{i}") for i in range(3)], next_page_token=token)
        for n, token in enumerate(["x", "y", ""])
    ]
    server.will("ListSessions", *pages, *pages[:2])
    assert [info.name for info in await client.list_sessions("s")] == [f"s{n}{i}" for n in range(3) for i in range(3)]
    asked = [(call.request.prefix, call.request.page_token) for call in server.calls]
    assert asked == [("s", ""), ("s", "x"), ("s", "y")]
    assert len(await client.list_sessions(limit=4)) == 4


async def test_everything_the_server_says_of_a_session_is_there(server: ScriptedServer, session: Session):
    message = inputs.session(
        length=40,
        codec=DEFAULT,
        exact_end=30,
        fit_fingerprint="f",
        created_unix_seconds=5.0,
        stored_bytes=7,
        raw_bytes=9,
        forked_from="root",
        forked_at=0,
    )
    server.will("GetSession", pb.GetSessionResponse(session=message))
    info = await session.info()
    assert (info.length, info.exact_end, info.fit_fingerprint, info.fitted) == (40, 30, "f", True)
    assert (info.codec, info.codec_fingerprint) == (DEFAULT, DEFAULT.fingerprint)
    assert (info.stored_bytes, info.raw_bytes, info.created_unix_seconds) == (7, 9, 5.0)
    assert (info.forked_from, info.forked_at, info.ttl_seconds) == ("root", 0, None)


async def test_refresh_adopts_what_others_have_appended(server: ScriptedServer, session: Session):
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session(length=25)))
    assert await session.refresh() == 25
    assert session.pin().end == session.length == 25


async def test_a_name_that_was_made_anew_is_another_session(server: ScriptedServer, session: Session):
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session(generation="2")))
    with pytest.raises(Aborted) as caught:
        await session.info()
    assert caught.value.reason == "GENERATION_CHANGED"


async def test_update_sends_only_what_changes(server: ScriptedServer, session: Session):
    server.always("UpdateSession", pb.UpdateSessionResponse(session=inputs.session(ttl_seconds=5.0)))
    assert (await session.update(ttl_seconds=5)).ttl_seconds == 5
    await session.update(clear_ttl=True, pinned=False)
    first, second = (call.request for call in server.of("UpdateSession"))
    assert (first.ttl_seconds, first.HasField("pinned"), first.clear_ttl, first.generation) == (5, False, False, "1")
    assert (second.HasField("ttl_seconds"), second.HasField("pinned"), second.pinned) == (False, True, False)


async def test_a_fork_shares_the_acknowledged_prefix_of_its_generation(server: ScriptedServer, session: Session):
    server.always("ForkSession", pb.ForkSessionResponse(session=inputs.session("child", length=10)))
    child = await session.fork("child", ttl_seconds=9)
    assert (child.name, child.length) == ("child", 10)
    await session.fork("child", end=0)
    first, second = (call.request for call in server.of("ForkSession"))
    assert (first.source, first.source_generation, first.end, first.ttl_seconds) == ("book", "1", 10, 9)
    assert second.HasField("end")
    assert second.end == 0


async def test_deleting_names_the_generation_only_from_a_handle(
    server: ScriptedServer, client: AsyncKVStoreClient, session: Session
):
    server.will("DeleteSession", pb.DeleteSessionResponse(deleted=True), pb.DeleteSessionResponse())
    assert await session.delete() is True
    assert await client.delete_session("book") is False
    first, second = (call.request for call in server.of("DeleteSession"))
    assert first.generation == "1"
    assert not second.HasField("generation")


async def test_a_prefix_match_is_a_value_or_nothing(server: ScriptedServer, client: AsyncKVStoreClient):
    found = pb.MatchPrefixResponse(session="book", generation="1", end=512, valid_until_unix_seconds=9.0)
    server.will("MatchPrefix", found, pb.MatchPrefixResponse())
    assert await client.match_prefix("llama", TokenChain(256, (b"a", b"b"))) == PrefixMatch("book", "1", 512, 9.0)
    assert await client.match_prefix("llama", TokenChain(256, ())) is None
    assert list(server.calls[0].request.block_hashes) == [b"a", b"b"]


async def test_a_projection_goes_in_pieces_and_is_named_by_its_hash(server: ScriptedServer, client: AsyncKVStoreClient):
    server.will("PutProjection", pb.PutProjectionResponse(sha256="ab"))
    data = bytes(range(256)) * (5 << 12)
    assert await client.put_projection(data) == "ab"
    pieces = [request.data for request in server.calls[0].requests]
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) == 2 << 20
    item = pb.ListProjectionsResponse.Projection(sha256="ab", bytes=4, model_fingerprint="m", header_json="{}")
    server.will("ListProjections", pb.ListProjectionsResponse(projections=[item]))
    assert await client.list_projections() == [ProjectionInfo("ab", 4, "m", "{}")]


def test_a_shape_survives_the_wire_and_unequal_layers_are_refused():
    assert shape_from(shape_to(SHAPE)) == SHAPE
    message = shape_to(SHAPE)
    message.sm_scale = 0
    assert shape_from(message).sm_scale == SHAPE.head_dim**-0.5
    message.layer_groups.add(count=1, kv_heads=1, query_heads=1, k_dim=32, v_dim=32)
    with pytest.raises(Internal, match="layers differ"):
        shape_from(message)


SCORES = pb.ScoreResponse(scores=inputs.to_proto(torch.zeros(1, 4, 10)), fidelity=pb.Fidelity(codec="raw"))
TOP_K = pb.TopKResponse(
    positions=inputs.to_proto(torch.zeros(1, 4, 2, dtype=torch.int64)), scores=inputs.to_proto(torch.zeros(1, 4, 2))
)
Use = Callable[[AsyncKVStoreClient, Session], Awaitable[object]]

CALLS: dict[str, tuple[object, Use]] = {
    "CreateSession": (pb.CreateSessionResponse(session=inputs.session()), lambda c, _: c.create_session("x", SHAPE)),
    "GetSession": (pb.GetSessionResponse(session=inputs.session()), lambda c, _: c.open_session("x")),
    "ListSessions": (pb.ListSessionsResponse(), lambda c, _: c.list_sessions()),
    "UpdateSession": (pb.UpdateSessionResponse(session=inputs.session()), lambda _, s: s.update(pinned=True)),
    "DeleteSession": (pb.DeleteSessionResponse(), lambda _, s: s.delete()),
    "ForkSession": (pb.ForkSessionResponse(session=inputs.session()), lambda _, s: s.fork("x")),
    "MatchPrefix": (pb.MatchPrefixResponse(), lambda c, _: c.match_prefix("m", TokenChain(1, ()))),
    "Prefetch": (pb.PrefetchResponse(resident_bytes=3), lambda _, s: s.prefetch()),
    "Append": (AppendLog(10), lambda _, s: s.append(*block(1))),
    "Score": ([SCORES], lambda _, s: s.score(0, query())),
    "TopK": (TOP_K, lambda _, s: s.topk(0, query(), 2)),
    "Attend": (Attending(), lambda _, s: s.attend(0, query())),
    "Fetch": ([pb.FetchResponse(header=pb.FetchHeader())], lambda _, s: s.fetch_sketches(layers=[])),
    "PutProjection": (pb.PutProjectionResponse(), lambda c, _: c.put_projection(b"x")),
    "GetProjection": ([pb.GetProjectionResponse(data=b"x")], lambda c, _: c.get_projection("x")),
    "ListProjections": (pb.ListProjectionsResponse(), lambda c, _: c.list_projections()),
    "GetServerInfo": (inputs.server_info(), lambda c, _: c.server_info()),
}


def test_the_table_of_calls_is_the_service():
    assert set(CALLS) == {method.name for method in SERVICE.methods}


@pytest.mark.parametrize("name", CALLS)
async def test_every_rpc_of_the_service_is_reached_from_the_client(
    server: ScriptedServer, client: AsyncKVStoreClient, session: Session, name: str
):
    answer, use = CALLS[name]
    server.will(name, answer)  # type: ignore[arg-type]
    await use(client, session)
    assert server.of(name)
