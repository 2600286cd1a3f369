"""The decode kernel against the definition in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.decode import decode
from kvstore_kernels.types import Expansion, SignRows, Signs
from tests.gpu import inputs
from tests.gpu.inputs import EXPANSIONS, device_signs, every_expansion, worst
from tests.kernels.inputs import SIZES, expansion, sign_rows, strided, vectors

inputs.require_device()
pytestmark = pytest.mark.gpu
QJL = EXPANSIONS["qjl"]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(params=[build.HOPPER_OPTIONS, ()], ids=["the device's products", "any device's products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hopper's own instructions where they are, then without them."""
    monkeypatch.setattr(build, "HOPPER_OPTIONS", request.param)
    build._compiled.cache_clear()
    yield
    build._compiled.cache_clear()


def decoded(rows: SignRows, dtype: torch.dtype = torch.float32) -> Tensor:
    return decode(device_signs(rows.signs), rows.expansion, dtype)


def assert_decodes(rows: SignRows, dtype: torch.dtype) -> None:
    """At most twice the error of rounding the truth: to the result's type, of float32 to float16."""
    truth, actual = vectors(rows), decoded(rows, dtype)
    assert actual.dtype == dtype
    rounded = truth.to(torch.float16 if dtype == torch.float32 else dtype)
    assert worst(actual, truth) <= 2 * worst(rounded, truth)


@pytest.mark.usefixtures("products")
@every_dtype
@every_expansion
def test_every_layout(by: Expansion, dtype: torch.dtype) -> None:
    assert_decodes(sign_rows(300, by), dtype)


@every_dtype
@pytest.mark.parametrize("tokens", [*SIZES, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_every_token_count(tokens: int, dtype: torch.dtype) -> None:
    assert_decodes(sign_rows(tokens, QJL), dtype)
    assert_decodes(sign_rows(tokens, EXPANSIONS["ragged groups"]), dtype)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("head_dim", [32, 96, 160, 256])
def test_every_head_dim(head_dim: int) -> None:
    assert_decodes(sign_rows(100, expansion((8, 5), head_dim)), torch.float16)


@pytest.mark.parametrize(("words", "groups"), [(40, 1), (66, 2), (200, 1)])
def test_sketches_too_wide_for_shared_memory(words: int, groups: int) -> None:
    assert_decodes(sign_rows(100, expansion((words, 3), 64, groups)), torch.float16)


def test_rows_of_very_different_size_share_one_expansion() -> None:
    by = expansion((12, 12), 128)
    for matrix in by.matrix:
        matrix *= torch.logspace(0, -2.5, len(matrix)).unsqueeze(1)
    assert_decodes(sign_rows(300, by), torch.float16)


def test_a_token_of_scale_zero_is_the_mean() -> None:
    rows = sign_rows(3, QJL)
    rows.signs.scales[1] = 0
    assert torch.equal(decoded(rows)[1].cpu(), QJL.mean)


def test_words_beyond_the_level_are_not_read() -> None:
    level = expansion((6, 6), read=(2, 5))
    rows = sign_rows(30, level)
    before = decoded(rows)
    rows.signs.words.view(30, 2, 6)[:, 0, 2:] ^= -1
    assert torch.equal(decoded(rows), before)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["qjl", "ragged groups"])
def test_a_row_decodes_alone_as_among_others_and_twice_the_same(name: str) -> None:
    rows = sign_rows(3000, EXPANSIONS[name])
    whole = decoded(rows, torch.float16)
    assert torch.equal(decoded(rows, torch.float16), whole)
    for row in (0, 63, 64, 2999):
        assert torch.equal(decoded(inputs.window(rows, row, row + 1), torch.float16)[0], whole[row])


def test_strided_input() -> None:
    rows = sign_rows(50, QJL)
    apart = Signs(strided(rows.signs.words), strided(rows.signs.scales))
    assert torch.equal(decoded(SignRows(apart, QJL)), decoded(rows))


def test_words_may_begin_anywhere() -> None:
    rows = sign_rows(50, QJL)
    words = torch.cat([torch.zeros(1, dtype=torch.int32), rows.signs.words.flatten()]).to(inputs.DEVICE)[1:]
    moved = Signs(words.view_as(rows.signs.words), rows.signs.scales.to(inputs.DEVICE))
    assert torch.equal(decode(moved, QJL), decoded(rows))


def test_what_does_not_fit_is_refused() -> None:
    signs = device_signs(sign_rows(4, QJL).signs)
    with pytest.raises(ValueError, match="for a layout of 8 words"):
        decode(signs, expansion((4, 4), 64))
    with pytest.raises(ValueError, match=r"dtype torch\.float64 is none of"):
        decode(signs, QJL, torch.float64)
