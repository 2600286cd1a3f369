"""Session means: exact sums in one order, bounded, named by their bytes."""

import pytest
import torch

from kvstore_codecs.plan import FIT_TOKENS_MAX, Fit
from tests.codecs.inputs import seeded


def rows(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, 2, tokens, 3, 32, generator=seeded(1)).to(dtype)
    return keys + 3, values


@pytest.mark.parametrize("tokens", [1, 2, 3, 255, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_are_those_of_float64(tokens: int, dtype: torch.dtype):
    keys, values = rows(tokens, dtype)
    fit = Fit.from_rows(keys, values, 4)
    assert fit.mean_keys.dtype == torch.float32
    assert (fit.mean_keys - keys.double().mean(dim=1)).abs().max() <= 1e-6
    assert (fit.mean_values - values.double().mean(dim=1)).abs().max() <= 1e-6
    assert (fit.token_start, fit.token_end) == (4, 4 + tokens)


def test_only_the_first_tokens_count():
    keys, values = rows(FIT_TOKENS_MAX + 10)
    fit = Fit.from_rows(keys, values, 0)
    assert fit.token_end == FIT_TOKENS_MAX
    assert fit == Fit.from_rows(keys[:, :FIT_TOKENS_MAX], values[:, :FIT_TOKENS_MAX], 0)


def test_bytes_do_not_depend_on_threads_or_strides():
    keys, values = rows(777)
    expected = Fit.from_rows(keys, values, 4).fingerprint
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    torch.set_num_threads(3)
    try:
        assert Fit.from_rows(strided, values, 4).fingerprint == expected
    finally:
        torch.set_num_threads(1)


def test_the_fingerprint_is_golden_and_follows_bytes_and_range():
    keys = torch.arange(2 * 5 * 3 * 32, dtype=torch.float32).reshape(2, 5, 3, 32)
    fit = Fit.from_rows(keys, -keys, 4)
    assert fit.fingerprint[:32] == "856581c3ab973c8e18d4753ab9afa7af"
    assert Fit.from_rows(keys, -keys, 5) != fit
    assert Fit.from_rows(keys + 1, -keys, 4) != fit
    assert hash(Fit.from_rows(keys, -keys, 4)) == hash(fit)


def test_bad_rows_are_refused():
    keys, values = rows(4)
    with pytest.raises(ValueError, match="N > 0"):
        Fit.from_rows(keys[:, :0], values[:, :0], 0)
    with pytest.raises(ValueError, match=r"\[2, 4, 3, 32\] and \[2, 3, 3, 32\]"):
        Fit.from_rows(keys, values[:, :3], 0)
    keys[1, 2, 0, 5] = torch.inf
    with pytest.raises(ValueError, match="NaN or Inf"):
        Fit.from_rows(keys, values, 0)
