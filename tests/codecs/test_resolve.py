"""From specs to plans: fingerprints, seeds, overrides, fits, limits of the caches."""

import pytest
import torch

from kvstore_codecs.plan import CodecPlan, DensePlan, Fit, NotFittedError, SignPlan
from kvstore_codecs.resolve import basis_bytes, plan_for
from kvstore_codecs.spec import DEFAULT, RAW, Affine, CodecSpec, LayerOverride, Qjl, Raw, Rotated
from kvstore_kernels.types import SignEncoder
from tests.codecs.inputs import shape_of

SHAPE = shape_of(64, layers=3, kv_heads=2, group=2, dtype="float16")
MIXED = CodecSpec(
    keys=Qjl(bits=128, outlier_channels=(1, 7)),
    values=Affine(planes=2),
    overrides=(
        LayerOverride(layers=(0,), keys=Raw(), values=Raw()),
        LayerOverride(layers=(-1,), keys=Rotated(planes=3)),
    ),
    mean="none",
)


def fit_of(seed: int = 1) -> Fit:
    means = torch.arange(2 * 3 * 2 * 64).reshape(2, 3, 2, 64) % 17 * seed / 8
    return Fit(means[0], means[1], 4, 260)


def projections(plan: CodecPlan) -> list[torch.Tensor]:
    plans = [p for p in (*plan.keys, *plan.values) if isinstance(p, SignPlan) and isinstance(p.encoder, SignEncoder)]
    return [p.encoder.heads[0].projection for p in plans if isinstance(p.encoder, SignEncoder)]


@pytest.mark.parametrize(
    ("spec", "fit", "spec_fingerprint", "plan_fingerprint"),
    [
        (RAW, None, "c08983df6e4f5909e82ac425f816caf4", "7048b9b4ba6259c0a06f293c2330ae6d"),
        (DEFAULT, fit_of(), "e401beb0199555cea25cb4071592de42", "800ed994d2e0f12465dcbc5a6480cd4d"),
        (MIXED, None, "4c0afe973502e759293e01d76dca99da", "ba22ff82910a28b0969e6b2d60811e6f"),
        (
            CodecSpec(keys=Qjl(basis="hadamard", scale="paper"), values=Rotated(basis="haar")),
            fit_of(),
            "e6dd2692010ce902af784cba1615f09d",
            "6556a5b1ffec3351ab3e0711cf3a91a8",
        ),
    ],
    ids=["raw", "default", "mixed", "paper"],
)
def test_fingerprints_are_golden(spec: CodecSpec, fit: Fit | None, spec_fingerprint: str, plan_fingerprint: str):
    """A change here means that stored sessions are read with other numbers than they were written with."""
    assert spec.fingerprint[:32] == spec_fingerprint
    assert plan_for(spec, SHAPE, fit).fingerprint[:32] == plan_fingerprint


def test_the_shape_has_a_golden_fingerprint():
    assert SHAPE.fingerprint[:32] == "96af32ae9cdcdd5f7f04a149428bca1a"


def test_fingerprints_follow_everything_that_changes_bytes():
    changed = [
        plan_for(DEFAULT, SHAPE, fit_of()),
        plan_for(DEFAULT, SHAPE, fit_of(2)),
        plan_for(DEFAULT.model_copy(update={"keys": Rotated(planes=4, seed=1)}), SHAPE, fit_of()),
        plan_for(DEFAULT.model_copy(update={"keys": Rotated(planes=3)}), SHAPE, fit_of()),
        plan_for(DEFAULT.model_copy(update={"sink_tokens": 5}), SHAPE, fit_of()),
        plan_for(DEFAULT, SHAPE.model_copy(update={"dtype": "bfloat16"}), fit_of()),
    ]
    assert len({plan.fingerprint for plan in changed}) == len(changed)
    assert plan_for(DEFAULT, SHAPE, fit_of()).fingerprint == changed[0].fingerprint


def test_every_layer_kind_and_seed_has_its_own_basis():
    spec = CodecSpec(keys=Rotated(), values=Rotated(), mean="none")
    other = CodecSpec(keys=Rotated(seed=1), values=Rotated(seed=1), mean="none")
    found = projections(plan_for(spec, SHAPE, None)) + projections(plan_for(other, SHAPE, None))
    assert len({p.numpy().tobytes() for p in found}) == 12


def test_overrides_choose_plans_by_layer():
    plan = plan_for(MIXED, SHAPE, None)
    assert isinstance(plan.of(0, "keys"), DensePlan)
    assert isinstance(plan.of(0, "values"), DensePlan)
    middle, last = plan.of(1, "keys"), plan.of(2, "keys")
    assert isinstance(middle, SignPlan)
    assert isinstance(last, SignPlan)
    assert (middle.layout.groups, last.layout.groups) == (2, 1)
    assert [len(p.levels) if isinstance(p, SignPlan) else 1 for p in plan.keys] == [1, 3, 3]


def test_outlier_words_come_first_so_that_every_level_reads_them():
    plan = plan_for(MIXED, SHAPE, None).of(1, "keys")
    assert isinstance(plan, SignPlan)
    assert plan.layout.word_groups[0] == (1, 1, 0, 0, 0, 0)
    assert [level.read_words(0) for level in plan.levels] == [6, 4, 3]


def test_queries_have_eight_bits_where_all_rows_weigh_the_same():
    def bits(codec: Qjl | Rotated | Affine) -> int:
        plan = plan_for(CodecSpec(keys=codec, values=Raw(), mean="none"), SHAPE, None).of(0, "keys")
        assert isinstance(plan, SignPlan)
        return plan.levels[0].query_bits

    assert [bits(Qjl()), bits(Rotated(planes=1)), bits(Affine(planes=1))] == [8, 8, 8]
    assert [bits(Qjl(outlier_channels=(0,))), bits(Rotated(planes=2)), bits(Affine(planes=2))] == [12, 12, 12]


def test_bytes_per_token_are_words_scales_and_dense_rows():
    plan = plan_for(MIXED, SHAPE, None)
    dense = 2 * 64 * 2
    qjl, rotated, affine = (128 + 64) // 8 + 2 * 2, 3 * 64 // 8 + 2, 2 * 64 // 8 + 4 * 2
    assert plan.bytes_per_token == 2 * dense + 2 * (qjl + rotated + 2 * affine)
    assert plan_for(RAW, SHAPE, None).bytes_per_token == SHAPE.raw_bytes_per_token


def test_means_reach_encoder_and_every_level_and_bases_are_shared():
    first, second = plan_for(DEFAULT, SHAPE, fit_of(1)), plan_for(DEFAULT, SHAPE, fit_of(2))
    for plan, seed in ((first, 1), (second, 2)):
        keys = plan.of(2, "keys")
        assert isinstance(keys, SignPlan)
        assert torch.equal(keys.encoder.mean, fit_of(seed).mean_keys[2])
        assert all(torch.equal(level.mean, fit_of(seed).mean_keys[2]) for level in keys.levels)
    assert all(a is b for a, b in zip(projections(first), projections(second), strict=True))


@pytest.mark.parametrize(
    "spec", [MIXED, CodecSpec(keys=Rotated(planes=6), values=Affine(planes=3), mean="none")], ids=str
)
def test_basis_bytes_are_known_before_a_basis_is_made(spec: CodecSpec):
    plan = plan_for(spec, SHAPE, None)
    matrices = [
        p.levels[i].matrix[0]
        for p in (*plan.keys, *plan.values)
        if isinstance(p, SignPlan)
        for i in range(len(p.levels))
    ]
    assert basis_bytes(spec, SHAPE) == sum(4 * m.numel() for m in (*matrices, *projections(plan)))


def test_a_codec_whose_bases_are_too_large_is_refused_before_they_are_made():
    spec = CodecSpec(keys=Qjl(bits=4096), values=Qjl(bits=4096), mean="none")
    with pytest.raises(ValueError, match="bases take 12550144000 bytes, the limit is 1073741824"):
        plan_for(spec, shape_of(256, layers=500), None)


def test_a_codec_with_session_means_is_refused_without_a_fit():
    with pytest.raises(NotFittedError, match="NOT_FITTED"):
        plan_for(DEFAULT, SHAPE, None)


def test_a_fit_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[3, 2, 64\], not \[3, 2, 128\]"):
        plan_for(DEFAULT, shape_of(128, layers=3, kv_heads=2), fit_of())


def test_a_fit_is_ignored_where_no_mean_is_subtracted():
    plan = plan_for(MIXED, SHAPE, fit_of())
    assert plan.fit is None
    assert plan.fingerprint == plan_for(MIXED, SHAPE, None).fingerprint


def test_equal_specs_and_fits_share_one_plan():
    assert plan_for(DEFAULT, SHAPE, fit_of()) is plan_for(DEFAULT.model_copy(), SHAPE.model_copy(), fit_of())


def test_debias_is_one_half_for_random_projections_only():
    plan = plan_for(MIXED, SHAPE, None)
    assert [p.debias if isinstance(p, SignPlan) else 0.0 for p in plan.keys] == [0.0, 0.5, 0.5]
    assert [p.debias if isinstance(p, SignPlan) else 0.0 for p in plan.values] == [0.0, 0.0, 0.0]
