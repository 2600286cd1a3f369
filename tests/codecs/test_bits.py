"""Stored words: where each row's bit lies, and that bits are those of exact arithmetic wherever it decides them."""

import pytest
import torch

from kvstore_codecs.spec import Affine, Qjl, Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import HeadEncoder, SignEncoder
from tests.codecs import oracle
from tests.codecs.inputs import SignCodec, seeded, sign_plan

LAYOUTS = [
    (Qjl(bits=160), 64),
    (Qjl(bits=256), 96),
    (Qjl(bits=256), 128),
    (Qjl(bits=512), 256),
    (Qjl(bits=128, outlier_channels=(3, 40)), 64),
    (Rotated(planes=3), 96),
    (Rotated(planes=4, basis="haar"), 128),
    (Affine(planes=2), 64),
    (Affine(planes=4), 256),
]


@pytest.mark.parametrize(("codec", "d"), LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [1, 37])
def test_words_and_scales_are_those_of_the_oracle(backend: Backend, codec: SignCodec, d: int, count: int):
    x = torch.randn(count, 2, d, generator=seeded(count))
    plan = sign_plan(codec, d, kv_heads=2)
    found, expected = backend.encode(x, plan.encoder), oracle.encode(x, plan.encoder)
    assert torch.equal(found.words, expected.words)
    assert (found.scales.float() - expected.scales.float()).abs().max() <= 1e-3 * expected.scales.float().abs().max()


def test_bit_j_of_word_w_is_row_32_w_plus_j_least_significant_first(backend: Backend):
    plan = sign_plan(Qjl(bits=160), 64)
    x = torch.randn(5, 1, 64, generator=seeded(1))
    assert isinstance(plan.encoder, SignEncoder)
    rows = oracle.project(x[:, 0], plan.encoder.heads[0]) > 0
    words = backend.encode(x, plan.encoder).words
    stored = bytes(words.numpy().astype("<i4").tobytes())
    for token in range(5):
        for row in range(160):
            byte = stored[20 * token + row // 8]
            assert byte >> (row % 8) & 1 == rows[token, row]


def test_unpacking_gives_back_what_was_packed():
    bits = torch.randint(0, 2, (100, 352), generator=seeded(2))
    words = oracle.pack(bits)
    assert torch.equal(oracle.unpack(words), bits)
    assert sum(int(word).bit_count() for word in words.flatten().long() & 0xFFFFFFFF) == int(bits.sum())


def test_a_row_that_is_exactly_zero_is_stored_as_minus_one(backend: Backend):
    words = backend.encode(torch.zeros(1, 1, 64), sign_plan(Qjl(bits=64), 64).encoder).words
    assert not words.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("codec", "d"), [(Qjl(bits=256), 128), (Rotated(planes=1), 128), (Rotated(planes=4), 128)], ids=str
)
def test_bits_differ_from_float64_only_at_a_threshold(backend: Backend, codec: SignCodec, d: int, dtype: torch.dtype):
    """One-plane rows only where |<s, k>| < 1e-5 |s| |k| / sqrt(d), at a rate of 1e-5; deeper indices by at most one."""
    x = torch.randn(4000, 1, d, generator=seeded(3)).to(dtype)
    plan = sign_plan(codec, d)
    assert isinstance(plan.encoder, SignEncoder)
    head = plan.encoder.heads[0]
    found = oracle.unpack(backend.encode(x, plan.encoder).words)
    exact = oracle.sign_bits(x[:, 0].float(), head)
    planes = int(head.depth.max())
    assert (found != exact).double().mean() <= 1e-5 * 2 ** (planes - 1)
    if planes > 1:
        assert (index_of(found, head) - index_of(exact, head)).abs().max() <= 1
        return
    z = oracle.project(x[:, 0].float(), head)
    scale = head.projection.double().norm(dim=1) * x[:, 0].double().norm(dim=1, keepdim=True) / d**0.5
    assert (z.abs() < 1e-5 * scale)[found != exact].all()


def index_of(bits: torch.Tensor, head: HeadEncoder) -> torch.Tensor:
    """Quantiser indices [N, C] of plane-major bits."""
    index = torch.zeros(len(bits), len(head.depth), dtype=torch.long)
    return index.index_add(1, head.row_coordinate.long(), bits << head.row_shift.long())


@pytest.mark.parametrize(("codec", "d"), LAYOUTS, ids=str)
def test_a_tokens_bytes_do_not_depend_on_its_neighbours_or_on_threads(backend: Backend, codec: SignCodec, d: int):
    x = torch.randn(70, 2, d, generator=seeded(4))
    plan = sign_plan(codec, d, kv_heads=2)
    together = backend.encode(x, plan.encoder)
    torch.set_num_threads(2)
    try:
        again = backend.encode(x, plan.encoder)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again.words, together.words)
    assert torch.equal(again.scales, together.scales)
    for token in (0, 33, 69):
        alone = backend.encode(x[token : token + 1], plan.encoder)
        assert torch.equal(alone.words[0], together.words[token])
        assert torch.equal(alone.scales[0], together.scales[token])
