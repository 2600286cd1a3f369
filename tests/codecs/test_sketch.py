"""One layer and kind of an append: made here, or checked when a client made it."""

from dataclasses import replace

import pytest
import torch

from kvstore_codecs.plan import DensePlan, KindPlan, SignPlan
from kvstore_codecs.sketch import KindRows, check_kind, encode_kind
from kvstore_codecs.spec import Affine, Qjl, Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import NonFiniteError, ScaleRangeError, Signs
from tests.codecs.inputs import seeded, shape_of, sign_plan

SHAPE = shape_of(64, kv_heads=2, dtype="bfloat16")
PLANS: list[KindPlan] = [
    DensePlan(),
    sign_plan(Qjl(bits=128, outlier_channels=(4,)), 64, kv_heads=2),
    sign_plan(Rotated(planes=2), 64, kv_heads=2),
    sign_plan(Affine(planes=2), 64, kv_heads=2),
]


def vectors(tokens: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, 2, 64, generator=seeded(1)).to(dtype)


@pytest.mark.parametrize("plan", PLANS, ids=["raw", "qjl", "rotated", "affine"])
@pytest.mark.parametrize(("tokens", "exact"), [(10, 0), (10, 4), (3, 3), (0, 0)])
def test_exact_rows_keep_their_bits_and_the_rest_becomes_signs(
    backend: Backend, plan: KindPlan, tokens: int, exact: int
):
    x = vectors(tokens)
    made = encode_kind(x, plan, exact, backend)
    check_kind(made, plan, SHAPE, tokens, exact)
    if isinstance(plan, DensePlan):
        assert torch.equal(made.rows, x)
        assert made.signs is None
        return
    assert torch.equal(made.rows, x[:exact])
    assert made.signs is not None
    assert len(made.signs.words) == len(made.signs.scales) == tokens - exact
    assert isinstance(plan, SignPlan)
    alone = backend.encode(x[exact:], plan.encoder)
    assert torch.equal(made.signs.words, alone.words)


@pytest.mark.parametrize("plan", PLANS, ids=["raw", "qjl", "rotated", "affine"])
@pytest.mark.parametrize("token", [1, 7])
def test_errors_count_tokens_from_the_start_of_the_append(backend: Backend, plan: KindPlan, token: int):
    """In the exact rows too, which no encoder looks at."""
    x = vectors(10)
    x[token, 1, 3] = torch.nan
    with pytest.raises(NonFiniteError) as error:
        encode_kind(x, plan, 4, backend)
    assert (error.value.token, error.value.head) == (token, 1)
    if not isinstance(plan, DensePlan):
        x = vectors(10, torch.float32)
        x[7, 1] = 3e38 * x[7, 1].sign()
        x[7, 1, ::2] = 1e30
        with pytest.raises(ScaleRangeError) as beyond:
            encode_kind(x, plan, 4, backend)
        assert (beyond.value.token, beyond.value.head) == (7, 1)


def changed_scale(rows: KindRows, column: int, value: float) -> KindRows:
    assert rows.signs is not None
    scales = rows.signs.scales.clone()
    scales[2, column] = value
    return replace(rows, signs=Signs(rows.signs.words, scales))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("plan", PLANS[1:], ids=["qjl", "rotated", "affine"])
def test_scales_that_are_not_finite_are_refused(backend: Backend, plan: KindPlan, value: float):
    made = encode_kind(vectors(10), plan, 4, backend)
    with pytest.raises(ValueError, match="scales: NaN or Inf"):
        check_kind(changed_scale(made, -1, value), plan, SHAPE, 10, 4)


def test_a_negative_alpha_is_refused_and_a_negative_offset_is_not(backend: Backend):
    made = encode_kind(vectors(10), PLANS[3], 4, backend)
    check_kind(changed_scale(made, 2, -1.0), PLANS[3], SHAPE, 10, 4)
    with pytest.raises(ValueError, match="scales: a negative alpha"):
        check_kind(changed_scale(made, 5, -1.0), PLANS[3], SHAPE, 10, 4)


def test_rows_words_and_scales_of_another_shape_or_dtype_are_refused(backend: Backend):
    plan = PLANS[1]
    made = encode_kind(vectors(10), plan, 4, backend)
    assert made.signs is not None
    words, scales = made.signs.words, made.signs.scales
    cases = {
        "rows": [replace(made, rows=made.rows[:3]), replace(made, rows=made.rows.float())],
        "words": [replace(made, signs=Signs(words[:, 1:], scales)), replace(made, signs=Signs(words.long(), scales))],
        "scales": [replace(made, signs=Signs(words, scales[1:])), replace(made, signs=Signs(words, scales.float()))],
        "signs": [replace(made, signs=None)],
    }
    for name, wrong in cases.items():
        for kind_rows in wrong:
            with pytest.raises(ValueError, match=f"^{name}: "):
                check_kind(kind_rows, plan, SHAPE, 10, 4)
    with pytest.raises(ValueError, match=r"^signs: .*as rows"):
        check_kind(KindRows(vectors(10), made.signs), DensePlan(), SHAPE, 10, 4)


def test_no_tokens_need_no_columns():
    """What an append of exact tokens only brings for a layer of signs."""
    nothing = Signs(torch.empty(0, 0, dtype=torch.int32), torch.empty(0, 0, dtype=torch.float16))
    check_kind(KindRows(vectors(3), nothing), PLANS[1], SHAPE, 3, 3)


def test_exact_rows_of_a_client_are_checked_too(backend: Backend):
    made = encode_kind(vectors(10), PLANS[1], 4, backend)
    rows = made.rows.clone()
    rows[3, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        check_kind(replace(made, rows=rows), PLANS[1], SHAPE, 10, 4)
