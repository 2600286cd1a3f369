import pytest

from kvstore_codecs.named import SHAPES, codec_named, name_of, shape_named
from kvstore_codecs.spec import DEFAULT, Affine, Qjl, Rotated


def test_shapes_are_read_by_name_and_by_numbers() -> None:
    assert shape_named("llama-3.1-8b") == SHAPES["llama-3.1-8b"] == shape_named("32x8x32x128")
    assert shape_named("2x1x2x32:float16").dtype == "float16"


def test_codecs_are_read_and_named_again() -> None:
    for text in ("raw", "rotated:3", "qjl:512/affine:4", "matryoshka:2.5", "projected:0.25"):
        assert name_of(codec_named(text)) == text
    mixed = codec_named("qjl/affine:4")
    assert (mixed.keys, mixed.values) == (Qjl(), Affine(planes=4))
    assert codec_named(DEFAULT.model_dump_json()) == codec_named("default") == DEFAULT
    assert codec_named("rotated").keys == Rotated()


@pytest.mark.parametrize("text", ["zip", "raw:4", "rotated:9", "rotated:x", ""])
def test_what_is_no_codec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not one of raw|validation error"):
        codec_named(text)


@pytest.mark.parametrize("text", ["gpt-9", "32x8x32", "32x8x33x128", "0x8x32x128", "2x1x2x32:int8"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not one of smollm2|validation error"):
        shape_named(text)
