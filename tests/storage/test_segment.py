"""A segment comes back as it was written, or not at all."""

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crc32c import crc32c
from safetensors import safe_open
from safetensors.torch import load

from kvstore_codecs.plan import Fit
from kvstore_codecs.spec import KINDS, ModelShape
from kvstore_server.errors import DataLoss, FailedPrecondition, InvalidArgument
from kvstore_server.storage.container import HEADER_BYTES_MAX, DamagedError
from kvstore_server.storage.segment import Segment, inspect_segment, read_header, read_segment, write_segment
from kvstore_server.storage.segment_header import Identity
from kvstore_server.storage.session_state import SessionState

from ..faults.tally import TALLY
from .inputs import SHAPE, SPEC, assert_equal_rows, commit_log, next_segment, object_bytes, random_fit
from .memory_store import MemoryStore

IDENTITY = Identity("default", "name", "000000000000", 0)


def segment(
    tokens: int = 3,
    exact: int = 1,
    *,
    shape: ModelShape = SHAPE,
    widths: tuple[int, int] = (1, 1),
    fit: Fit | None = None,
    epoch: int = 0,
    block_hashes: tuple[bytes, ...] = (),
    seed: int = 0,
) -> Segment:
    log = commit_log(MemoryStore())
    state, _ = log.create("name", shape, SPEC)
    more = {"fit": fit, "epoch": epoch, "block_hashes": block_hashes}
    return next_segment(log, state, tokens, exact=exact, widths=widths, seed=seed, **more)


def written(source: Segment) -> bytes:
    return object_bytes(write_segment(source))


def rewritten(data: bytes, change: Any) -> bytes:
    """The object with its JSON header changed and its header checksum made right again."""
    (length,) = struct.unpack_from("<Q", data)
    fields = json.loads(data[8 : 8 + length])
    change(fields)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = struct.pack("<Q", len(text)) + text
    return head + struct.pack("<I", crc32c(head)) + data[8 + length + 4 :]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "exact", "widths"),
    [(1, 0, (1, 1)), (1, 1, (2, 3)), (5, 2, (3, 1)), (256, 4, (1, 2)), (257, 257, (4, 1)), (513, 300, (0, 0))],
)
def test_what_is_written_is_read_again_bit_for_bit(
    dtype: Any, tokens: int, exact: int, widths: tuple[int, int]
) -> None:
    shape = ModelShape(layers=3, kv_heads=2, query_heads=4, head_dim=64, dtype=dtype, sm_scale=0.125)
    source = segment(
        tokens, exact, shape=shape, widths=widths, fit=random_fit(shape), block_hashes=(b"\1" * 32, b"\2" * 32)
    )
    read = read_segment(memoryview(bytearray(written(source))), IDENTITY)
    assert read.header == source.header
    assert_equal_rows(source, read)
    assert read.fit
    assert source.fit
    assert torch.equal(read.fit.mean_keys, source.fit.mean_keys)
    assert torch.equal(read.fit.mean_values, source.fit.mean_values)
    assert (read.fit.token_start, read.fit.token_end) == (source.fit.token_start, source.fit.token_end)


@pytest.mark.parametrize("bases", [(2, 2), (1, 0), (0, 2)])
def test_bases_of_a_fit_are_read_again_and_ask_for_a_newer_reader(bases: tuple[int, int]) -> None:
    source = segment(5, 1, fit=random_fit(SHAPE, bases=bases))
    data = written(source)
    read = read_segment(data, IDENTITY)
    assert read.fit == source.fit
    assert read.header == source.header
    assert load(data)["fit.basis_keys" if bases[0] else "fit.basis_values"].dtype == torch.float16
    assert b'"version":"2","min_reader":"2"' in data
    assert b'"version":"1","min_reader":"1"' in written(segment(5, 1, fit=random_fit(SHAPE)))


def test_an_epoch_is_read_again_and_asks_for_a_newer_reader() -> None:
    for fit in (None, random_fit(SHAPE, bases=(1, 0))):
        source = segment(5, 0, fit=fit, epoch=2)
        data = written(source)
        assert read_segment(data, IDENTITY).header == source.header
        assert b'"version":"4","min_reader":"4"' in data


def test_nan_and_infinity_survive_in_exact_rows() -> None:
    source = segment(2, 2)
    source.keys[0].rows[:] = torch.tensor([float("nan"), float("inf")], dtype=torch.float16).repeat(16)
    read = read_segment(written(source), IDENTITY)
    assert torch.equal(read.keys[0].rows.view(torch.int16), source.keys[0].rows.view(torch.int16))


def test_layers_that_store_nothing_but_the_mean_come_back_empty() -> None:
    read = read_segment(written(segment(4, 1, widths=(0, 0))), IDENTITY)
    signs = read.values[1].signs
    assert signs
    assert signs.words.shape == (3, 0)
    assert signs.scales.shape == (3, 0)


def test_reading_and_writing_share_memory_with_the_tensors() -> None:
    source = segment(4, 1)
    parts = write_segment(source)
    source.keys[0].rows.zero_()
    data = memoryview(bytearray(object_bytes(parts)))
    (length,) = struct.unpack_from("<Q", data)
    assert bytes(data[8 + length + 64 :][:64]) == bytes(64)  # keys.rows follow the 64 bytes of crc

    read, damages = inspect_segment(data, IDENTITY)
    assert damages
    data[8 + length + 64 :][:4] = b"\x00\x3c\x00\x3c"
    assert read.keys[0].rows[0, 0, :3].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("fit", [None, random_fit(SHAPE)])
def test_the_plain_library_opens_it(tmp_path: Path, fit: Fit | None) -> None:
    source = segment(300, 4, widths=(3, 1), fit=fit)
    data = written(source)
    (length,) = struct.unpack_from("<Q", data)
    assert (8 + length) % 64 == 0
    tensors = load(data)
    assert torch.equal(tensors["keys.rows"], torch.cat([rows.rows for rows in source.keys]))
    signs = source.values[1].signs
    assert signs
    assert torch.equal(tensors["values.words"].view(torch.int32).view(signs.words.shape), signs.words)
    assert torch.equal(tensors["values.scales"].view(signs.scales.shape), signs.scales)
    assert ("fit.mean_keys" in tensors) == (fit is not None)
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["format"] == "kvstore.segment"
        for name in list(file.keys()):
            assert torch.equal(file.get_tensor(name), tensors[name])


def is_refused(data: bytes, identity: Identity = IDENTITY) -> bool:
    try:
        read_segment(data, identity)
    except (DataLoss, FailedPrecondition):
        return True
    return False


def test_every_flipped_byte_is_detected() -> None:
    data = bytearray(written(segment(3, 1, fit=random_fit(SHAPE), block_hashes=(b"\7" * 32,))))
    source, row = random.Random(1), TALLY.row("a bit of every byte of an object flipped")
    for place in range(len(data)):
        flip = 1 << source.randrange(8)
        data[place] ^= flip
        row.losses += not is_refused(bytes(data))
        row.cycles = row.operations = place + 1
        data[place] ^= flip
    assert row.losses == 0
    assert not is_refused(bytes(data))


def test_every_truncation_and_every_tail_is_detected() -> None:
    data = written(segment(2, 1))
    for length in range(len(data)):
        assert is_refused(data[:length]), f"{length} bytes"
    assert is_refused(data + b"\0")
    assert is_refused(data + data)


@pytest.mark.parametrize("field", ["tenant", "session", "generation", "start"])
def test_the_object_of_another_append_is_refused(field: str) -> None:
    data = written(segment())
    other = replace(IDENTITY, **{field: 7 if field == "start" else "other"})
    with pytest.raises(DataLoss) as caught:
        read_segment(data, other)
    assert caught.value.facts["session"] == other.session
    assert caught.value.facts["token_start"] == str(other.start)


@pytest.mark.parametrize(("kind", "layer"), [("keys", 0), ("values", 0), ("keys", 1), ("values", 1)])
def test_a_damaged_page_is_named_and_the_others_may_be_used(kind: Any, layer: int) -> None:
    source = segment(600, 3, widths=(2, 1))
    data = bytearray(written(source))
    rows = source.of(layer, kind)
    needle = (rows.signs.words[300] if rows.signs else rows.rows[300]).contiguous().view(torch.uint8)
    place = bytes(data).index(bytes(needle.flatten().tolist()))
    data[place] ^= 0x10
    read, damages = inspect_segment(data, IDENTITY)
    assert [(d.token_start, d.token_end, d.layer, d.kind) for d in damages] == [(256, 512, layer, kind)]
    for other in KINDS:
        if other != kind:
            assert torch.equal(read.of(layer, other).rows, source.of(layer, other).rows)
    with pytest.raises(DataLoss) as caught:
        read_segment(data, IDENTITY)
    assert caught.value.facts["token_start"] == "256"
    assert caught.value.facts["token_end"] == "512"


def test_a_damaged_fit_and_damaged_checksums_are_named() -> None:
    source = segment(3, 1, fit=random_fit(SHAPE, bases=(2, 2)))
    data = bytearray(written(source))
    assert source.fit
    for tensor in source.fit.tensors.values():
        place = bytes(data).index(tensor.numpy().tobytes())
        data[place] ^= 1
        assert [d.kind for d in inspect_segment(data, IDENTITY)[1]] == ["fit"]
        data[place] ^= 1
    (length,) = struct.unpack_from("<Q", data)
    data[8 + length + 4] ^= 1  # slot 1
    assert [d.what for d in inspect_segment(data, IDENTITY)[1]] == ["checksums"]


def test_a_newer_format_is_refused_as_such_and_an_older_reader_may_go_on() -> None:
    data = written(segment())
    with pytest.raises(FailedPrecondition):
        read_segment(rewritten(data, lambda f: f["__metadata__"].update(version="5", min_reader="5")), IDENTITY)
    readable = rewritten(data, lambda f: f["__metadata__"].update(version="5", something="new"))
    assert read_segment(readable, IDENTITY).header.tokens == 3


def lie(**fields: str) -> Any:
    return lambda header: header["__metadata__"].update(fields)


def move(header: dict[str, Any]) -> None:
    header["keys.rows"]["data_offsets"][0] += 2


LIES = {
    "tokens": lie(tokens="2"),
    "huge tokens": lie(tokens=str(2**32)),
    "more than huge tokens": lie(tokens=str(2**80)),
    "a number of 5,000 digits": lie(tokens="9" * 5000),
    "exact beyond tokens": lie(exact="4"),
    "negative start": lie(start="-1"),
    "huge layers": lie(layers=json.dumps([[1024, None, None]] * 1024)),
    "huge widths": lie(layers=json.dumps([[2, [2**40, 1], None]])),
    "no layers": lie(layers="[]"),
    "deep layers": lie(layers="[" * 100_000),
    "another head_dim": lie(head_dim="64"),
    "odd head_dim": lie(head_dim="33"),
    "another dtype": lie(dtype="float32"),
    "unknown dtype": lie(dtype="int8"),
    "a fit that is not there": lie(fit_range="[0,4]"),
    "bases without a fit": lie(fit_bases="[1,0]"),
    "bases that are not there": lie(fit_range="[0,4]", fit_bases="[2,2]"),
    "huge bases": lie(fit_range="[0,4]", fit_bases="[1025,0]"),
    "one number of bases": lie(fit_range="[0,4]", fit_bases="[1]"),
    "a negative epoch": lie(epoch="-1"),
    "not a number": lie(created_unix_seconds="nan"),
    "another format": lie(format="other"),
    "metadata that is no strings": lambda h: h["__metadata__"].update(tokens=3),
    "no metadata": lambda h: h.pop("__metadata__"),
    "a missing field": lambda h: h["__metadata__"].pop("digest"),
    "a missing tensor": lambda h: h.pop("keys.words"),
    "an extra tensor": lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "a hole": move,
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_with_a_right_checksum_is_refused(name: str) -> None:
    data = rewritten(written(segment()), LIES[name])
    with pytest.raises(DataLoss):
        read_segment(data, IDENTITY)


def test_a_name_that_occurs_twice_is_refused() -> None:
    data = written(segment())
    (length,) = struct.unpack_from("<Q", data)
    text = data[8 : 8 + length].replace(b'"tokens":"3"', b'"tokens":"9","tokens":"3"').rstrip(b" ")
    text += b" " * (-(8 + len(text)) % 64)
    head = struct.pack("<Q", len(text)) + text
    with pytest.raises(DamagedError):
        read_header(memoryview(head + struct.pack("<I", crc32c(head))), IDENTITY)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES_MAX + 56, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_bounds_is_refused_before_it_is_read(length: int) -> None:
    assert is_refused(struct.pack("<Q", length) + bytes(200))


def test_random_bytes_and_random_damage_only_raise_our_errors() -> None:
    source = random.Random(3)
    data = written(segment(2, 1))
    for _ in range(2000):
        if source.random() < 0.3:
            assert is_refused(source.randbytes(source.randrange(300)))
            continue
        changed = bytearray(data)
        for _ in range(source.randrange(1, 6)):
            changed[source.randrange(len(changed))] = source.randrange(256)
        assert bytes(changed) == data or is_refused(bytes(changed))


def test_tensors_that_do_not_fit_the_header_are_not_written() -> None:
    source = segment(4, 1)
    short = replace(source.keys[0], rows=source.keys[0].rows[:3])
    assert source.keys[1].signs
    wide = replace(source.keys[1], signs=replace(source.keys[1].signs, scales=torch.zeros(3, 2).half()))
    doubled = replace(source.keys[0], rows=source.keys[0].rows.double())
    for wrong in ((short, source.keys[1]), (source.keys[0], wide), (doubled, source.keys[1])):
        with pytest.raises(ValueError, match="layer"):
            write_segment(replace(source, keys=wrong))
    with pytest.raises(ValueError, match="fit"):
        write_segment(replace(source, fit=random_fit(SHAPE)))


def test_too_many_block_hashes_are_the_callers_fault() -> None:
    with pytest.raises(InvalidArgument) as caught:
        write_segment(segment(block_hashes=(b"\0" * 32,) * 70_000))
    assert caught.value.facts["field"] == "block_hashes"


def test_strided_rows_are_written_in_their_order() -> None:
    source = segment(4, 4)
    strided = replace(source.keys[0], rows=source.keys[0].rows.flip(0))
    assert not strided.rows[::2].is_contiguous()
    twice = torch.stack([strided.rows, strided.rows], dim=1).reshape(8, 1, 32)[::2]
    data = written(replace(source, keys=(replace(strided, rows=twice), source.keys[1])))
    assert torch.equal(read_segment(data, IDENTITY).keys[0].rows, strided.rows)


def test_a_state_names_its_next_segment() -> None:
    log = commit_log(MemoryStore())
    state, _ = log.create("name", SHAPE, SPEC)
    first = next_segment(log, state, 2)
    log.commit(state, first)
    second = next_segment(log, state, 3).header
    assert (first.header.previous, first.header.previous_digest) == (None, "")
    assert (second.start, second.previous, second.previous_digest) == (2, 0, first.header.digest)
    assert isinstance(state, SessionState)
