"""Projection files: read as written, or refused, whatever their header claims."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvstore_codecs.artifact import HEADER_BYTES_MAX, ProjectionHeader, read_projection, write_projection
from kvstore_codecs.spec import CodecSpec, Matryoshka, Raw
from tests.codecs.inputs import shape_of
from tests.codecs.spectra import HEADS, LAYERS, fitted_plan, projection

D = 32
WORDS = ((2.0, tuple(range(6)) * 2), (2.25, (1,) * 12))


def made() -> bytes:
    found = projection(D, "output", WORDS)
    return write_projection(found.header, found.parts)


def test_a_projection_comes_back_as_it_was_written(tmp_path: Path):
    data, source = made(), projection(D, "output", WORDS)
    found = read_projection(data, source.sha256)
    assert found == source
    assert found.header == source.header
    assert all(torch.equal(found.parts[name], source.parts[name]) for name in source.parts)
    assert found.parts["words.2"][1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "words.3" not in found.parts
    (tmp_path / "file").write_bytes(data)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "file").items()} == {
        name: shape for name, (_, shape) in found.header.tensors().items()
    }


def test_a_file_from_before_shares_and_figures_is_read_as_it_is():
    assert b"measured" not in made()
    assert b"shares" not in made()
    header = read_projection(made()).header
    assert (header.shares, header.measured) == ((), {})
    with_more = header.model_copy(update={"shares": (0.5,), "measured": {"kl": 0.5}})
    ranks = torch.full((2, LAYERS, HEADS), D, dtype=torch.int32)
    parts = {**projection(D, "output", WORDS).parts, "ranks.0.5": ranks}
    assert read_projection(write_projection(with_more, parts)).header == with_more
    with pytest.raises(ValueError, match=r"ranks\.0\.5: ranks of a head are outside \[0, 32\]"):
        write_projection(with_more, {**parts, "ranks.0.5": ranks + 1})


def lying(**changes: Any) -> Callable[[bytes], bytes]:
    """The file with another header, its tensors declared accordingly."""

    def change(data: bytes) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        stated = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["header"]) | changes
        header = ProjectionHeader.model_construct(**stated)
        fields: dict[str, Any] = {
            "__metadata__": {
                "format": "kvstore.projection",
                "header": json.dumps(stated, sort_keys=True, separators=(",", ":")),
            }
        }
        end = 0
        for name, (dtype, shape) in header.tensors().items():
            size = 4
            for side in shape:
                size *= side
            start, end = end, end + size
            fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return change


def renamed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


LIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a model of a thousand layers": (lying(layers=1024, kv_heads=256, head_dim=256), "header takes 2759"),
    "more heads than a model has": (lying(kv_heads=10**9), "kv_heads"),
    "a head_dim that is no multiple of 32": (lying(head_dim=48), "head_dim"),
    "a later reader": (lying(min_reader=2), "needs a reader of version 2"),
    "positions that were not calibrated": (lying(max_position=5000), "max_position 5000 is beyond the 2000"),
    "fields of its own": (lying(extra=1), "extra"),
    "cut short": (lambda data: data[:-4], "bytes, where its header takes"),
    "longer": (lambda data: data + b"1234", "bytes, where its header takes"),
    "nothing": (lambda data: b"", "0 bytes are no projection"),
    "a header beyond the file": (lambda data: struct.pack("<Q", 2**40) + data[8:], "within the file"),
    "a header over the limit": (
        lambda data: struct.pack("<Q", HEADER_BYTES_MAX + 1) + bytes(2 * HEADER_BYTES_MAX),
        "within the file",
    ),
    "another format": (renamed(b"kvstore.projection", b"kvstore.projectioN"), "is no projection"),
    "another tensor": (renamed(b"keys.weights", b"keys.weightz"), "not those that its header describes"),
    "another dtype": (renamed(b'"U32"', b'"I32"'), "not those that its header describes"),
    "nested without end": (lambda data: struct.pack("<Q", 100_000) + b"[" * 100_000, "is no projection"),
}


@pytest.mark.parametrize(("change", "text"), LIES.values(), ids=LIES)
def test_a_lie_is_refused_before_anything_is_allocated_for_it(change: Callable[[bytes], bytes], text: str):
    data = change(made())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=text):
            read_projection(data)
        assert tracemalloc.get_traced_memory()[1] <= 4 * len(data) + (4 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("keys.basis", torch.nan, "keys.basis holds NaN or Inf"),
        ("values.mean", torch.inf, "values.mean holds NaN or Inf"),
        ("keys.basis", 0.0, "keys: a basis is singular"),
        ("values.weights", -1.0, "values: .* not positive"),
        ("words.2", 7, r"words.2: words of a head are outside \[0, 6\]"),
        ("words.2", -1, r"words.2: words of a head are outside \[0, 6\]"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(name: str, value: float, text: str):
    found = projection(D, "output", WORDS)
    parts = {each: tensor.clone() for each, tensor in found.parts.items()}
    parts[name][0, 0] = value
    with pytest.raises(ValueError, match=text):
        write_projection(found.header, parts)


def test_tensors_that_are_not_those_of_the_header_are_not_written():
    found = projection(D, "output", WORDS)
    with pytest.raises(ValueError, match="not those that the header describes"):
        write_projection(found.header, {name: t for name, t in found.parts.items() if name != "keys.mean"})


def test_a_changed_byte_is_another_projection():
    data = bytearray(made())
    data[-1] ^= 1
    with pytest.raises(ValueError, match="the projection's sha256 is"):
        read_projection(data, projection(D, "output", WORDS).sha256)


def test_a_session_of_another_model_is_refused():
    found = projection(D)
    codec = Matryoshka(basis=f"projection:{found.sha256}")
    spec = CodecSpec(keys=codec, values=Raw(), mean="none")
    shape = shape_of(D, layers=LAYERS, kv_heads=HEADS)
    found.check_serves(spec, shape)
    for field, value in (("layers", 3), ("kv_heads", 1), ("head_dim", 64)):
        with pytest.raises(ValueError, match=f"has {field} "):
            found.check_serves(spec, shape.model_copy(update={field: value, "query_heads": 3}))
    with pytest.raises(ValueError, match="is not here"):
        fitted_plan(codec, D)


def test_a_session_basis_needs_the_metrics_of_its_projection():
    found = projection(D, "none")
    spec = CodecSpec(keys=Matryoshka(basis=f"session:{found.sha256}"), values=Raw(), fit_tokens=512)
    with pytest.raises(ValueError, match="has no metrics"):
        found.check_serves(spec, shape_of(D, layers=LAYERS, kv_heads=HEADS))
