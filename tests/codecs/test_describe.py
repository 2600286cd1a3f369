"""What a codec costs, and that docs/codecs.md prints what the command prints."""

import re
from pathlib import Path

import pytest

from kvstore_codecs.describe import Bits, bits_table, describe, plane_table
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import RAW, Affine, CodecSpec, LayerOverride, Qjl, Raw, Rotated
from tests.codecs.inputs import shape_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "codecs.md"


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        (Qjl(bits=256), Affine(planes=2), (Bits(2, 0.125), Bits(2, 1), Bits(2, 0.5625))),
        (Rotated(planes=4), Rotated(planes=2), (Bits(4, 0.125), Bits(2, 0.125), Bits(3, 0.125))),
        (Qjl(bits=256, outlier_channels=(0,)), Raw(), (Bits(2.5, 0.25), Bits(16, 0), Bits(9.25, 0.125))),
    ],
    ids=str,
)
def test_bits_per_number(keys, values, expected: tuple[Bits, Bits, Bits]):
    shape = shape_of(128, layers=2, kv_heads=4, dtype="float16")
    found = describe(plan_for(CodecSpec(keys=keys, values=values, mean="none"), shape, None))
    assert (found["keys"], found["values"], found["both"]) == expected


def test_bits_are_averaged_over_layers_and_match_the_bytes():
    shape = shape_of(64, layers=4, kv_heads=2, dtype="bfloat16")
    override = LayerOverride(layers=(0,), keys=Raw(), values=Raw())
    plan = plan_for(CodecSpec(keys=Rotated(), values=Rotated(), mean="none", overrides=(override,)), shape, None)
    bits = describe(plan)
    assert bits["keys"] == Bits((16 + 3 * 4) / 4, 3 * 0.25 / 4)
    assert bits["both"].total * 2 * 4 * 2 * 64 / 8 == plan.bytes_per_token
    assert describe(plan_for(RAW, shape, None))["both"].total == 16


def test_the_document_has_the_tables_that_the_command_prints():
    text = DOCUMENT.read_text()
    for table in (bits_table(), plane_table()):
        assert "\n".join(table) in text


def test_the_document_names_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", DOCUMENT.read_text())
    assert len(named) > 20
    for file, name in named:
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(), f"{file}::{name}"
