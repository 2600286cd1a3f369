"""Codec specs and model shapes: what they refuse, and that equal ones have equal fingerprints everywhere."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from kvstore_codecs.resolve import check_spec
from kvstore_codecs.spec import DEFAULT, RAW, CodecSpec, KindCodec, LayerOverride, ModelShape, Qjl, Raw, Rotated
from tests.codecs.inputs import shape_of

SHAPE = {"layers": 2, "kv_heads": 2, "query_heads": 4, "head_dim": 64, "dtype": "float16", "sm_scale": 0.125}


def refusal(model: Any, values: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        TypeAdapter(model).validate_python(values)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("layers", 0, "1"),
        ("layers", 1025, "1024"),
        ("kv_heads", 257, "256"),
        ("head_dim", 288, "256"),
        ("head_dim", 48, "32"),
        ("dtype", "float64", "float32"),
        ("sm_scale", 0.0, "0"),
        ("sm_scale", float("nan"), "finite"),
        ("logit_soft_cap", -1.0, "0"),
        ("query_heads", 3, "multiple of kv_heads 2"),
        ("model_fingerprint", "x" * 257, "256"),
        ("unknown", 1, "unknown"),
    ],
)
def test_shapes_name_the_field_and_the_limit(field: str, value: Any, limit: str):
    text = refusal(ModelShape, {**SHAPE, field: value})
    assert field in text
    assert limit in text


@pytest.mark.parametrize(
    ("values", "field", "limit"),
    [
        ({"name": "qjl", "bits": 48}, "bits", "32"),
        ({"name": "qjl", "bits": 8192}, "bits", "4096"),
        ({"name": "qjl", "seed": -1}, "seed", "0"),
        ({"name": "qjl", "basis": "fourier"}, "basis", "haar"),
        ({"name": "qjl", "outlier_channels": [3, 3]}, "outlier_channels", "distinct"),
        ({"name": "qjl", "outlier_channels": [9, 3]}, "outlier_channels", "sorted"),
        ({"name": "qjl", "outlier_channels": [256]}, "outlier_channels", "256"),
        ({"name": "rotated", "planes": 7}, "planes", "6"),
        ({"name": "affine", "planes": 0}, "planes", "1"),
        ({"name": "raw", "planes": 1}, "planes", "not permitted"),
        ({"name": "other"}, "other", "rotated"),
    ],
)
def test_codecs_name_the_field_and_the_limit(values: dict[str, Any], field: str, limit: str):
    text = refusal(KindCodec, values)
    assert field in text
    assert limit in text


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"sink_tokens": 257}, "256"),
        ({"fit_tokens": 0}, "1"),
        ({"fit_tokens": 4097}, "4096"),
        ({"mean": "model"}, "session"),
    ],
)
def test_specs_name_the_field_and_the_limit(change: dict[str, Any], limit: str):
    text = refusal(CodecSpec, {"keys": {"name": "raw"}, "values": {"name": "raw"}, **change})
    assert next(iter(change)) in text
    assert limit in text


@pytest.mark.parametrize(
    ("spec", "field", "limit"),
    [
        (CodecSpec(keys=Qjl(outlier_channels=(64,)), values=Raw()), "keys.outlier_channels: 64", "[0, 64)"),
        (CodecSpec(keys=Raw(), values=Qjl(outlier_channels=tuple(range(64)))), "values.outlier_channels", "63"),
        (
            CodecSpec(keys=Raw(), values=Raw(), overrides=(LayerOverride(layers=(1, 2)),)),
            "overrides[0].layers: 2",
            "[-2, 2)",
        ),
        (
            CodecSpec(keys=Raw(), values=Raw(), overrides=(LayerOverride(layers=(-3,)),)),
            "overrides[0].layers: -3",
            "[-2, 2)",
        ),
        (
            CodecSpec(
                keys=Raw(), values=Raw(), overrides=(LayerOverride(layers=(0,), keys=Qjl(outlier_channels=(99,))),)
            ),
            "overrides[0].keys.outlier_channels: 99",
            "[0, 64)",
        ),
    ],
)
def test_a_spec_that_does_not_fit_the_shape_is_refused_by_field_and_limit(spec: CodecSpec, field: str, limit: str):
    with pytest.raises(ValueError, match=r"outside|at most") as error:
        check_spec(spec, shape_of(64, layers=2))
    assert field in str(error.value)
    assert limit in str(error.value)


def test_later_overrides_win_and_negative_layers_count_from_the_end():
    spec = CodecSpec(
        keys=Rotated(planes=4),
        values=Rotated(planes=4),
        overrides=(
            LayerOverride(layers=(0, 1, -1), keys=Raw(), values=Raw()),
            LayerOverride(layers=(-1,), keys=Rotated(planes=6)),
        ),
    )
    chosen = [(spec.for_layer(i, "keys", 4).name, spec.for_layer(i, "values", 4).name) for i in range(4)]
    assert chosen == [("raw", "raw"), ("raw", "raw"), ("rotated", "rotated"), ("rotated", "raw")]
    assert spec.for_layer(3, "keys", 4) == Rotated(planes=6)


def test_only_a_codec_that_subtracts_means_needs_a_fit():
    assert DEFAULT.needs_fit
    assert not RAW.needs_fit
    assert not CodecSpec(keys=Raw(), values=Raw()).needs_fit
    assert not CodecSpec(keys=Rotated(), values=Raw(), mean="none").needs_fit
    assert CodecSpec(keys=Raw(), values=Raw(), overrides=(LayerOverride(layers=(0,), keys=Qjl()),)).needs_fit


def test_specs_are_frozen_and_survive_json():
    spec = CodecSpec(
        keys=Qjl(outlier_channels=(1, 5)), values=Rotated(), overrides=(LayerOverride(layers=(-1,), keys=Raw()),)
    )
    assert CodecSpec.model_validate_json(spec.model_dump_json()) == spec
    assert hash(spec) == hash(CodecSpec.model_validate(spec.model_dump()))
    with pytest.raises(ValidationError, match="frozen"):
        spec.sink_tokens = 9  # type: ignore[misc]
