import re

import pytest
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status

from kvstore_client import AsyncKVStoreClient, Internal, KVStoreError, OutOfRange, errors
from kvstore_client.errors import BY_CODE, from_status
from kvstore_server import errors as server_errors

from .scripted import Failure, ScriptedServer

CODES = sorted(kind.code for kind in BY_CODE.values())
UNRETRIED = [code for code in CODES if code not in ("CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE")]


@pytest.mark.parametrize("code", UNRETRIED)
async def test_each_code_raises_its_own_class_with_reason_and_facts(
    server: ScriptedServer, client: AsyncKVStoreClient, code: str
):
    server.will("GetSession", Failure(code, "look here", "THE_REASON", {"field": "name", "limit": "128"}))
    with pytest.raises(BY_CODE[Code.Value(code)]) as caught:
        await client.open_session("book")
    assert type(caught.value).code == code
    assert str(caught.value) == f"{code}: look here"
    assert caught.value.reason == "THE_REASON"
    assert caught.value.facts == {"field": "name", "limit": "128"}
    assert caught.value.__suppress_context__, "the user sees no frames of the transport"


async def test_retry_info_becomes_seconds():
    error = from_status(Failure("RESOURCE_EXHAUSTED", retry_after_seconds=1.25).status())
    assert error.retry_after_seconds == 1.25
    assert from_status(Failure("RESOURCE_EXHAUSTED").status()).retry_after_seconds is None


def test_a_detail_that_cannot_be_read_leaves_the_code():
    status = Failure("NOT_FOUND", facts={"a": "b"}).status()
    status.details[0].value = b"\xff\xff"
    error = from_status(status)
    assert (type(error).code, error.facts) == ("NOT_FOUND", {})


def test_a_code_of_another_planet_is_unknown():
    assert type(from_status(Status(code=77, message="?"))) is errors.Unknown


def test_the_length_of_out_of_range_is_a_number_or_nothing():
    assert OutOfRange("", facts={"length": "12"}).length == 12
    assert OutOfRange("", facts={"length": "-1"}).length is None
    assert OutOfRange("").length is None


def test_every_code_but_ok_has_a_class_and_the_docstring_draws_the_tree():
    drawn = dict(re.findall(r"[|`]- (\w+) +([A-Z_]+) ", errors.__doc__ or ""))
    assert drawn == {kind.__name__: kind.code for kind in KVStoreError.__subclasses__()}
    assert set(drawn.values()) == set(CODES)


def test_the_server_s_errors_have_the_same_names_here():
    for kind in server_errors.KVStoreError.__subclasses__():
        assert getattr(errors, kind.__name__).code == kind.code


def test_an_error_survives_a_copy_and_a_pickle():
    import copy
    import pickle

    error = Internal("boom", reason="R", facts={"a": "b"}, retry_after_seconds=2)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(twin), twin.reason, twin.facts, twin.retry_after_seconds) == ("INTERNAL: boom", "R", {"a": "b"}, 2)
