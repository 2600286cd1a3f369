import pytest
import torch

from kvstore_kernels.backend import Backend
from kvstore_kernels.types import DenseRows, Expansion, SignRows
from tests.kernels.inputs import SIZES, assert_close, dense_rows, expansion, sign_rows, vectors
from tests.kernels.test_score import EXPANSIONS


@pytest.mark.parametrize("by", EXPANSIONS.values(), ids=EXPANSIONS.keys())
def test_every_layout_decodes_to_its_definition(backend: Backend, by: Expansion) -> None:
    rows = sign_rows(70, by)
    assert_close(backend.decode(rows).double(), vectors(rows), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_every_token_count_and_head_dim(backend: Backend, tokens: int, head_dim: int) -> None:
    rows = sign_rows(tokens, expansion(head_dim=head_dim))
    decoded = backend.decode(rows)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (tokens, 2, head_dim)
    assert_close(decoded.double(), vectors(rows), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_rows_decode_to_their_values(backend: Backend, dtype: torch.dtype) -> None:
    rows = dense_rows(20).data.to(dtype)
    assert torch.equal(backend.decode(DenseRows(rows)), rows.float())


def test_a_token_with_scale_zero_decodes_to_the_mean(backend: Backend) -> None:
    by = expansion()
    rows = sign_rows(3, by)
    rows.signs.scales[1] = 0
    assert torch.equal(backend.decode(rows)[1], by.mean)


def test_words_beyond_the_level_are_not_read(backend: Backend) -> None:
    level = expansion((6, 6), read=(2, 5))
    rows = sign_rows(30, level)
    before = backend.decode(rows)
    rows.signs.words.view(30, 2, 6)[:, 0, 2:] ^= -1
    assert torch.equal(backend.decode(SignRows(rows.signs, level)), before)
