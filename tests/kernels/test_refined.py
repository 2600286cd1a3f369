import pytest
import torch

from kvstore_kernels import reference
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import DenseRows, Rows, SignRows, Signs
from tests.kernels.inputs import assert_close, attention64, expansion, logits64, normal, sign_rows, vectors
from tests.kernels.test_score import queries

FINE = {
    "one group": expansion(),
    "ragged": expansion((3, 0, 8), groups=1),
    "ragged groups": expansion((3, 0, 8), groups=2, offsets=True),
}
COARSE = {
    "one group": expansion(read=(2, 2)),
    "ragged": expansion((3, 0, 8), groups=1, read=(1, 0, 3)),
    "ragged groups": expansion((3, 0, 8), groups=2, offsets=True, read=(2, 0, 0)),
}
every_layout = pytest.mark.parametrize("name", FINE)
HOW = {"sm_scale": 0.125, "logit_soft_cap": 0.0, "debias": 0.5}


@every_layout
def test_scores_at_positions_are_those_of_all_bit_for_bit(backend: Backend, name: str) -> None:
    keys, q = sign_rows(300, FINE[name]), queries(FINE[name])
    positions = torch.randint(300, (*q.shape[:2], 17), generator=torch.Generator().manual_seed(1))
    found = backend.score_at(q, keys, positions, sm_scale=0.3, logit_soft_cap=20.0)
    assert torch.equal(found, backend.score(q, keys, sm_scale=0.3, logit_soft_cap=20.0).gather(2, positions))


@every_layout
@pytest.mark.parametrize("best", [1, 20, 400])
def test_the_best_tokens_are_read_finely_and_all_others_coarsely(backend: Backend, name: str, best: int) -> None:
    keys, values = sign_rows(300, FINE[name]), sign_rows(300, FINE[name], seed=9)
    coarse = tuple(SignRows(rows.signs, COARSE[name]) for rows in (keys, values))
    q = queries(FINE[name])
    out, lse = backend.attend_refined(q, (coarse[0], coarse[1]), (keys, values), best, **HOW)
    logits = reference.logits(q, coarse[0], **HOW)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, backend.topk(logits, best)[0], True)
    seen = [torch.where(chosen, *(logits64(q, k, 0.125, debias=0.5) for k in (keys, coarse[0])))]
    weights = torch.softmax(seen[0], 2)
    group = q.shape[1] // FINE[name].layout.heads
    expected = sum(
        torch.einsum("thn,nhd->thd", weights * part, vectors(rows).repeat_interleave(group, 1))
        for part, rows in ((chosen, values), (~chosen, coarse[1]))
    )
    assert isinstance(expected, torch.Tensor)
    assert_close(lse.double(), seen[0].logsumexp(2), rtol=1e-5, atol=1e-5)
    assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_dense_values_beside_sketched_keys(backend: Backend) -> None:
    keys, values = sign_rows(300, FINE["one group"]), DenseRows(normal(300, 2, 64))
    q = queries(FINE["one group"])
    pairs: tuple[tuple[Rows, Rows], tuple[Rows, Rows]] = (
        (SignRows(keys.signs, COARSE["one group"]), values),
        (keys, values),
    )
    out, _ = backend.attend_refined(q, *pairs, 300, **HOW)
    assert_close(out.double(), attention64(logits64(q, keys, 0.125, debias=0.5), values)[0], rtol=1e-4, atol=1e-5)


@every_layout
def test_only_the_rows_at_the_positions_are_read(backend: Backend, name: str) -> None:
    """Any other row may change. Were the coarse level read finely, or more rows than asked for, this would show."""
    by, q = FINE[name], queries(FINE[name], tokens=1)
    keys = sign_rows(300, by)
    positions = torch.arange(0, 300, 30).expand(*q.shape[:2], 10)
    others = torch.ones(300, dtype=torch.bool).index_fill_(0, positions[0, 0], False)
    spoilt = Signs(keys.signs.words.clone(), keys.signs.scales.clone())
    spoilt.words[others], spoilt.scales[others] = -1, torch.inf
    found = backend.score_at(q, SignRows(spoilt, by), positions, sm_scale=0.3)
    assert torch.equal(found, backend.score_at(q, keys, positions, sm_scale=0.3))


def test_a_row_that_sees_no_token_of_a_part_takes_nothing_from_it(backend: Backend) -> None:
    """Refining as many tokens as there are leaves nothing to the coarse pass."""
    by = FINE["one group"]
    keys, values, q = sign_rows(40, by), sign_rows(40, by, seed=9), queries(by)
    coarse = SignRows(keys.signs, COARSE["one group"]), SignRows(values.signs, COARSE["one group"])
    out, lse = backend.attend_refined(q, coarse, (keys, values), 40, **HOW)
    expected, expected_lse = backend.attend(q, keys, values, **HOW)
    assert_close(out, expected, rtol=1e-6)
    assert_close(lse, expected_lse, rtol=1e-6)
