import pytest
import torch

from kvstore_kernels import pack_rows, unpack_rows
from kvstore_kernels.packing import signs_of
from tests.kernels.inputs import uniform


@pytest.mark.parametrize("row", [0, 1, 31, 32, 63])
def test_row_is_bit_row_mod_32_of_word_row_div_32(row: int) -> None:
    bits = torch.zeros(1, 64, dtype=torch.bool)
    bits[0, row] = True
    expected = [0, 0]
    expected[row // 32] = 1 << row % 32
    assert [word & 0xFFFFFFFF for word in pack_rows(bits)[0].tolist()] == expected


@pytest.mark.parametrize("m", [32, 64, 96, 160, 256])
def test_unpacking_gives_back_what_was_packed(m: int) -> None:
    bits = uniform(5, 3, m) < 0.5
    words = pack_rows(bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, 3, m // 32)
    assert torch.equal(unpack_rows(words).bool(), bits)
    assert torch.equal(signs_of(words), bits * 2.0 - 1)


def test_no_tokens_and_no_rows_pack_to_nothing() -> None:
    assert pack_rows(torch.zeros(0, 64, dtype=torch.bool)).shape == (0, 2)
    assert pack_rows(torch.zeros(7, 0, dtype=torch.bool)).shape == (7, 0)
    assert unpack_rows(torch.zeros(7, 0, dtype=torch.int32)).shape == (7, 0)


def test_strided_words_unpack_as_contiguous_ones() -> None:
    words = pack_rows(uniform(4, 128) < 0.5)
    assert torch.equal(unpack_rows(words[::2, 1:3]), unpack_rows(words[::2, 1:3].clone()))
