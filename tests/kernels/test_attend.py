from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvstore_kernels import cpu_backend, merge_states
from kvstore_kernels.backend import Backend, ReferenceBackend
from kvstore_kernels.types import DenseRows, Expansion, Rows
from tests.kernels.inputs import (
    SIZES,
    any_rows,
    assert_close,
    attention64,
    dense_rows,
    expansion,
    logits64,
    normal,
    part,
    sign_rows,
    vectors,
)
from tests.kernels.test_score import EXPANSIONS, queries

kinds = pytest.mark.parametrize("kinds", [("sign", "sign"), ("sign", "dense"), ("dense", "sign"), ("dense", "dense")])
every_expansion = pytest.mark.parametrize("by", EXPANSIONS.values(), ids=EXPANSIONS.keys())


def assert_attends(actual: tuple[Tensor, Tensor], q: Tensor, keys: Rows, values: Rows, **how: float) -> None:
    """At most twice the error of the same sums in plain float32."""
    logits = logits64(q, keys, **how)
    out, lse = attention64(logits, values)
    x = vectors(values).float()
    weights = torch.softmax(logits.float(), 2).unflatten(1, (x.shape[1], -1))
    plain = torch.einsum("thgn,nhd->thgd", weights, x).flatten(1, 2)
    assert (actual[0] - out).abs().max() <= 2 * (plain - out).abs().max() + 1e-6 * x.abs().max()
    assert (actual[1] - lse).abs().max() <= 2e-6 * (1 + logits.abs().max())


@kinds
@pytest.mark.parametrize("tokens", SIZES[1:])
def test_every_pair_of_kinds_and_token_count(backend: Backend, kinds: tuple[str, str], tokens: int) -> None:
    keys, values, q = any_rows(kinds[0], tokens), any_rows(kinds[1], tokens, seed=7), normal(2, 6, 64)
    assert_attends(backend.attend(q, keys, values, sm_scale=0.125), q, keys, values, sm_scale=0.125)


@every_expansion
def test_every_layout_of_keys_and_of_values(backend: Backend, by: Expansion) -> None:
    q, heads = queries(by), by.layout.heads
    for keys, values in (
        (sign_rows(90, by), dense_rows(90, heads)),
        (dense_rows(90, heads), sign_rows(90, by)),
        (sign_rows(90, by), sign_rows(90, by, seed=9)),
    ):
        how = {"sm_scale": 0.125, "debias": 0.5}
        assert_attends(backend.attend(q, keys, values, **how), q, keys, values, **how)


@kinds
def test_no_tokens_give_zero_and_minus_infinity(backend: Backend, kinds: tuple[str, str]) -> None:
    out, lse = backend.attend(normal(2, 4, 64), any_rows(kinds[0], 0), any_rows(kinds[1], 0), sm_scale=1.0)
    assert torch.equal(out, torch.zeros(2, 4, 64))
    assert torch.equal(lse, torch.full((2, 4), -torch.inf))


@kinds
def test_no_queries_give_no_answers(backend: Backend, kinds: tuple[str, str]) -> None:
    out, lse = backend.attend(normal(0, 4, 64), any_rows(kinds[0], 5), any_rows(kinds[1], 5), sm_scale=1.0)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_heads_without_words_are_read_as_their_means(backend: Backend) -> None:
    by = expansion((0, 0))
    keys, values, q = sign_rows(40, by), sign_rows(40, by), normal(1, 4, 64)
    out, lse = backend.attend(q, keys, values, sm_scale=0.5)
    means = by.mean.repeat_interleave(2, 0)
    assert_close(out[0], means)
    assert_close(lse[0], (q[0] * means).sum(1) * 0.5 + torch.tensor(40.0).log())


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16])
@kinds
def test_grouped_query_heads_attend_as_each_alone(backend: Backend, kinds: tuple[str, str], group: int) -> None:
    keys, values, q = any_rows(kinds[0], 50), any_rows(kinds[1], 50, seed=7), normal(1, 2 * group, 64)
    out, lse = backend.attend(q, keys, values, sm_scale=0.125)
    for g in range(group):
        alone = backend.attend(q[:, g::group], keys, values, sm_scale=0.125)
        assert torch.equal(out[:, g::group], alone[0])
        assert torch.equal(lse[:, g::group], alone[1])


@kinds
def test_a_query_token_attends_alone_as_among_others(backend: Backend, kinds: tuple[str, str]) -> None:
    keys, values, q = any_rows(kinds[0], 1100), any_rows(kinds[1], 1100, seed=7), normal(23, 6, 64)
    out, lse = backend.attend(q, keys, values, sm_scale=0.125)
    for token in (0, 1, 9, 10, 11, 22):
        alone = backend.attend(q[token : token + 1], keys, values, sm_scale=0.125)
        assert torch.equal(alone[0][0], out[token])
        assert torch.equal(alone[1][0], lse[token])


@kinds
def test_the_number_of_threads_changes_no_bit(kinds: tuple[str, str]) -> None:
    keys, values, q = any_rows(kinds[0], 9000), any_rows(kinds[1], 9000, seed=7), normal(1, 4, 64)
    backend, answers = cpu_backend(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(backend.attend(q, keys, values, sm_scale=0.125))
    finally:
        torch.set_num_threads(1)
    for out, lse in answers[1:]:
        assert torch.equal(out, answers[0][0])
        assert torch.equal(lse, answers[0][1])


def test_calls_from_several_threads_at_once_do_not_disturb_one_another() -> None:
    keys, values, q = any_rows("sign", 5000), any_rows("sign", 5000, seed=7), normal(8, 4, 64)
    backend = cpu_backend()
    expected, _ = backend.attend(q, keys, values, sm_scale=0.125)
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(backend.attend, row[None], keys, values, sm_scale=0.125) for row in q]
        assert torch.equal(torch.cat([answer.result()[0] for answer in answers]), expected)
    finally:
        torch.set_num_threads(1)


@kinds
def test_compiled_answers_are_the_reference_s_to_a_millionth(kinds: tuple[str, str]) -> None:
    keys, values, q = any_rows(kinds[0], 2100), any_rows(kinds[1], 2100, seed=7), normal(2, 6, 64)
    how = {"sm_scale": 0.5, "logit_soft_cap": 30.0, "debias": 0.5}
    actual = cpu_backend().attend(q, keys, values, **how)
    expected = ReferenceBackend().attend(q, keys, values, **how)
    scale = float(vectors(values).abs().max())
    assert_close(actual[0], expected[0], rtol=0, atol=1e-6 * scale)
    assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-6)


def test_windows_of_different_kinds_merge_to_attention_over_all_of_them(backend: Backend) -> None:
    keys, values, q = any_rows("sign", 300), any_rows("sign", 300, seed=7), normal(3, 6, 64)
    sinks, recent = (dense_rows(4, seed=1), dense_rows(4, seed=2)), (dense_rows(33, seed=3), dense_rows(33, seed=4))
    how = {"sm_scale": 0.125}
    windows = [
        sinks,
        (part(keys, 0, 100), part(values, 0, 100)),
        (part(keys, 100, 300), part(values, 100, 300)),
        recent,
    ]
    out, lse = merge_states([backend.attend(q, k, v, **how) for k, v in windows])
    logits = torch.cat([logits64(q, k, **how) for k, _ in windows], 2)
    whole = DenseRows(torch.cat([vectors(v) for _, v in windows]))
    expected = attention64(logits, whole)
    assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_debias_takes_its_share_of_half_of_each_variance_off_before_the_cap(backend: Backend, share: float) -> None:
    by = expansion((5, 5), groups=2)
    keys, values, q = sign_rows(80, by), dense_rows(80), normal(2, 4, 64)
    how = {"sm_scale": 0.7, "debias": share}
    assert_attends(backend.attend(q, keys, values, logit_soft_cap=15.0, **how), q, keys, values, cap=15.0, **how)


def test_huge_logits_do_not_overflow(backend: Backend) -> None:
    keys, values, q = dense_rows(50), dense_rows(50, seed=7), 1e4 * normal(1, 4, 64)
    out, lse = backend.attend(q, keys, values, sm_scale=1.0)
    best = logits64(q, keys, 1.0).argmax(2)[0]
    assert_close(out[0], values.data[best, torch.tensor([0, 0, 1, 1])])
    assert lse.isfinite().all()


def test_the_order_of_heads_of_keys_and_values_is_checked(backend: Backend) -> None:
    with pytest.raises(ValueError, match="keys of 5 tokens"):
        backend.attend(normal(1, 2, 64), dense_rows(5), dense_rows(6), sm_scale=1.0)
    with pytest.raises(ValueError, match="keys of 5 tokens"):
        backend.attend(normal(1, 2, 64), dense_rows(5), dense_rows(5, heads=1), sm_scale=1.0)


def test_a_level_equals_a_sketch_that_never_had_the_other_words(backend: Backend) -> None:
    whole, level = expansion((6, 6)), expansion((6, 6), read=(2, 2))
    short = replace(expansion((2, 2)), matrix=level.matrix, noise=level.noise)
    keys, q = sign_rows(60, whole), normal(1, 4, 64)
    words = keys.signs.words.view(60, 2, 6)[..., :2].flatten(1)
    at_level = replace(keys, expansion=level)
    cut = replace(keys, signs=replace(keys.signs, words=words), expansion=short)
    for a, b in zip(
        backend.attend(q, at_level, at_level, sm_scale=0.125), backend.attend(q, cut, cut, sm_scale=0.125), strict=True
    ):
        assert torch.equal(a, b)
