import pytest
import torch

from kvstore_kernels.backend import Backend, ReferenceBackend, cpu_backend
from kvstore_kernels.types import DenseRows, Expansion, SignRows, Signs
from tests.kernels.inputs import (
    SIZES,
    any_rows,
    assert_close,
    dense_rows,
    expansion,
    logits64,
    normal,
    sign_rows,
    strided,
    vectors,
)

EXPANSIONS = {
    "one group": expansion(),
    "outliers": expansion((5, 5), groups=2),
    "offsets": expansion((4, 4), groups=2, offsets=True),
    "ragged": expansion((3, 0, 8), groups=1),
    "ragged groups": expansion((3, 0, 8), groups=2, offsets=True),
    "level": expansion((8, 8), groups=2, offsets=True, read=(3, 0)),
    "8 bits": expansion(query_bits=8),
}
every_expansion = pytest.mark.parametrize("by", EXPANSIONS.values(), ids=EXPANSIONS.keys())


def queries(by: Expansion, tokens: int = 3, group: int = 3) -> torch.Tensor:
    return normal(tokens, by.layout.heads * group, by.layout.head_dim, seed=5)


@every_expansion
def test_logits_of_signs_are_those_of_the_integer_query(backend: Backend, by: Expansion) -> None:
    keys, q = sign_rows(70, by), queries(by)
    expected = logits64(q, keys, 0.125)
    actual = backend.score(q, keys, sm_scale=0.125)
    assert_close(actual.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@every_expansion
def test_a_fine_integer_query_scores_the_decoded_vectors(backend: Backend, by: Expansion) -> None:
    fine = Expansion(**{**vars(by), "query_bits": 16})
    keys, q = sign_rows(70, fine), queries(by)
    q_heads = q.double().unflatten(1, (by.layout.heads, -1))
    expected = torch.einsum("thgd,nhd->thgn", q_heads, vectors(keys)).flatten(1, 2)
    error = backend.score(q, keys, sm_scale=1.0).double() - expected
    assert error.abs().max() <= 1e-3 * expected.abs().max()


@every_expansion
def test_compiled_logits_of_signs_are_the_reference_s_bit_for_bit(by: Expansion) -> None:
    keys, q = sign_rows(300, by), queries(by)
    assert torch.equal(cpu_backend().score(q, keys, sm_scale=0.3), ReferenceBackend().score(q, keys, sm_scale=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_dense_rows_are_as_good_as_plain_float32(backend: Backend, dtype: torch.dtype) -> None:
    keys, q = DenseRows(dense_rows(300).data.to(dtype)), normal(2, 6, 64)
    truth = logits64(q, keys, 0.125)
    rows = q.unflatten(1, (2, 3))
    plain = torch.einsum("thgd,nhd->thgn", rows, keys.data.float()).flatten(1, 2) * 0.125
    error = (backend.score(q, keys, sm_scale=0.125) - truth).abs().max()
    assert error <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("kind", ["sign", "dense"])
@pytest.mark.parametrize("tokens", SIZES)
def test_every_token_count(backend: Backend, kind: str, tokens: int) -> None:
    keys, q = any_rows(kind, tokens), normal(1, 4, 64)
    logits = backend.score(q, keys, sm_scale=0.125)
    assert logits.shape == (1, 4, tokens)
    assert_close(logits, logits64(q, keys, 0.125), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sign", "dense"])
@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_every_head_dim(backend: Backend, kind: str, head_dim: int) -> None:
    keys = sign_rows(20, expansion(head_dim=head_dim)) if kind == "sign" else dense_rows(20, head_dim=head_dim)
    q = normal(1, 4, head_dim)
    assert_close(backend.score(q, keys, sm_scale=0.1), logits64(q, keys, 0.1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sign", "dense"])
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16])
def test_grouped_query_heads_score_as_each_alone(backend: Backend, kind: str, group: int) -> None:
    keys, q = any_rows(kind, 40), normal(2, 2 * group, 64)
    together = backend.score(q, keys, sm_scale=0.125)
    for g in range(group):
        alone = backend.score(q[:, g::group], keys, sm_scale=0.125)
        assert torch.equal(together[:, g::group], alone)


@pytest.mark.parametrize("kind", ["sign", "dense"])
def test_a_query_token_scores_alone_as_among_others(backend: Backend, kind: str) -> None:
    keys, q = any_rows(kind, 300), normal(11, 6, 64)
    together = backend.score(q, keys, sm_scale=0.125)
    for token in range(11):
        assert torch.equal(backend.score(q[token : token + 1], keys, sm_scale=0.125)[0], together[token])


@pytest.mark.parametrize("kind", ["sign", "dense"])
def test_the_soft_cap_bounds_logits_smoothly(backend: Backend, kind: str) -> None:
    keys, q = any_rows(kind, 60), 10 * normal(1, 4, 64)
    capped = backend.score(q, keys, sm_scale=1.0, logit_soft_cap=20.0)
    assert capped.abs().max() <= 20
    assert_close(capped, logits64(q, keys, 1.0, cap=20.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sign", "dense"])
def test_strided_input(backend: Backend, kind: str) -> None:
    keys, q = any_rows(kind, 30), normal(2, 4, 64)
    if isinstance(keys, SignRows):
        apart = SignRows(Signs(strided(keys.signs.words), strided(keys.signs.scales)), keys.expansion)
    else:
        apart = DenseRows(strided(keys.data))
    expected = backend.score(q, keys, sm_scale=0.125)
    assert torch.equal(backend.score(strided(q), apart, sm_scale=0.125), expected)


def test_rows_that_do_not_fit_their_layout_are_refused(backend: Backend) -> None:
    keys = sign_rows(4, expansion())
    with pytest.raises(ValueError, match="words have shape"):
        backend.score(
            normal(1, 2, 64), sign_rows(4, expansion((5, 4))).__class__(keys.signs, expansion((5, 4))), sm_scale=1.0
        )
    with pytest.raises(ValueError, match="q has shape"):
        backend.score(normal(1, 3, 64), keys, sm_scale=1.0)
