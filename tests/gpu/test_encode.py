"""The CUDA encoders against the reference: rows may differ where rounding to half can carry z over a threshold."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvstore_kernels import reference
from kvstore_kernels.cuda import encode as ops
from kvstore_kernels.cuda.encoding import check
from kvstore_kernels.reference.encode import group_levels, step_widths
from kvstore_kernels.types import (
    AffineEncoder,
    Encoder,
    NonFiniteError,
    ScaleRangeError,
    SignEncoder,
    SignLayout,
    Signs,
)
from tests.kernels.inputs import normal, sign_encoder, signs64, strided

if not torch.cuda.is_available():
    pytest.skip("torch has no CUDA device", allow_module_level=True)
pytest.importorskip("cupy", reason="kernels are compiled by CuPy")
pytestmark = pytest.mark.gpu

NEAR = 2e-3
"""Of |s| |x| / sqrt(channels): how near a threshold halves may be on its other side."""
DIFFERENT_MOST = 5e-4
"""Share of one-plane rows; with every plane twice as many."""


def qjl(
    head_dim: int = 128, heads: int = 3, *, rows: int = 0, norm_factor: tuple[float, ...] | None = None
) -> SignEncoder:
    return sign_encoder(head_dim, heads=heads, rows=rows or 2 * head_dim, norm_factor=norm_factor)


def outliers(norm_factor: tuple[float, ...] | None = None) -> SignEncoder:
    """Channels below 8 have the second of two groups, with the last 96 of 352 rows."""
    base = qjl(rows=352)
    support = torch.stack([torch.arange(128) >= 8, torch.arange(128) < 8]).float()
    mask = torch.cat([support[:1].expand(256, 128), support[1:].expand(96, 128)])
    head = replace(base.heads[0], projection=base.heads[0].projection * mask)
    layout = SignLayout(128, 2, ((0,) * 8 + (1,) * 3,) * 3)
    return SignEncoder(layout, (head,) * 3, base.mean, support, norm_factor)


def ragged() -> SignEncoder:
    """Heads of 0, 2, 8 and 2 words with their own projections; one has coordinates of 4, 3, 1 and 0 planes."""
    few, other, deep = (sign_encoder(planes=planes).heads[0] for planes in (1, 1, 4))
    depth = torch.tensor([4] * 32 + [3] * 32 + [1] * 32 + [0] * 32, dtype=torch.int32)
    rows = [(c, depth[c] - 1 - plane) for plane in range(4) for c in range(128) if depth[c] > plane]
    mixed = replace(
        deep,
        projection=torch.cat([deep.projection, 1e-3 * few.projection.flip(0)]),
        depth=depth,
        sigma=torch.cat([torch.ones(64), torch.full((64,), 1e-3)]),
        row_coordinate=torch.tensor([c for c, _ in rows], dtype=torch.int32),
        row_shift=torch.tensor([int(shift) for _, shift in rows], dtype=torch.int32),
        row_weight=torch.tensor([0.1 * 2.0**shift for _, shift in rows]),
    )
    layout = SignLayout(64, 1, ((), (0,) * 2, (0,) * 8, (0,) * 2))
    heads = (few, few, mixed, replace(other, projection=other.projection.flip(1)))
    return SignEncoder(layout, heads, normal(4, 64, seed=3), torch.ones(1, 64), coded_energy=True)


def shuffled() -> SignEncoder:
    """Planes whose rows come in no order at all."""
    base = sign_encoder(128, 3, heads=3)
    head, order = base.heads[0], torch.randperm(384, generator=torch.Generator().manual_seed(4))
    rows = {name: getattr(head, name)[order] for name in ("row_coordinate", "row_shift", "row_weight")}
    return replace(base, heads=(replace(head, **rows),) * 3)


def affine(planes: int, head_dim: int = 128, heads: int = 3) -> AffineEncoder:
    """The first of the heads stores nothing."""
    groups = head_dim // 32
    own = tuple(range(groups)) * planes
    layout = SignLayout(head_dim, groups, ((), *(own,) * (heads - 1)), has_offsets=True)
    return AffineEncoder(layout, planes, normal(heads, head_dim, seed=3))


def vectors(tokens: int, encoder: Encoder, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return normal(tokens, encoder.layout.heads, encoder.layout.head_dim, seed=seed).to(dtype)


def encoded(x: Tensor, encoder: Encoder) -> Signs:
    signs = ops.encode(x.cuda(), encoder)
    return Signs(signs.words.cpu(), signs.scales.cpu())


def equal(a: Signs, b: Signs) -> bool:
    return torch.equal(a.words, b.words) and torch.equal(a.scales, b.scales)


def cells_of(signs: Signs, encoder: SignEncoder, head: int) -> Tensor:
    """The cell that the head's rows say each coordinate lies in, int64 [N, C]."""
    layout, code = encoder.layout, encoder.heads[head]
    bits = signs64(signs.words[:, layout.word_starts[head] : layout.word_starts[head + 1]]) > 0
    cells = torch.zeros(len(bits), len(code.depth), dtype=torch.int64)
    return cells.index_add_(1, code.row_coordinate.long(), bits.long() << code.row_shift.long())


def assert_encodes(x: Tensor, encoder: SignEncoder, signs: Signs) -> None:
    """Rows as the reference has them but near thresholds, and scales right for the rows that are there."""
    expected = reference.encode(x, encoder)
    for head, groups in enumerate(encoder.layout.word_groups):
        if groups:
            centred = (x[:, head].float() - encoder.mean[head]).double()
            _assert_rows(centred, encoder, head, cells_of(signs, encoder, head), cells_of(expected, encoder, head))
            _assert_scales(centred, encoder, head, signs)


def _assert_rows(x: Tensor, encoder: SignEncoder, head: int, cells: Tensor, expected: Tensor) -> None:
    code = encoder.heads[head]
    projection, planes = code.projection.double(), int(code.depth.max())
    z, used = x @ projection.T, projection != 0
    length = (x.square() @ used.T.double()).sqrt() * projection.norm(dim=1) / used.sum(1).sqrt()
    gain = (z / code.sigma.double())[:, code.depth > 0].square().mean(1, keepdim=True).sqrt()
    width = step_widths(code) * gain
    distance = torch.where(code.depth > 1, (z - (z / width).round() * width).abs(), z.abs())
    different = cells != expected
    assert (cells - expected).abs().max() <= 1
    assert (distance[different] <= NEAR * length[different]).all()
    assert different.sum() <= DIFFERENT_MOST * 2 ** (planes - 1) * different.numel() + 2


def _assert_scales(x: Tensor, encoder: SignEncoder, head: int, signs: Signs) -> None:
    layout, code = encoder.layout, encoder.heads[head]
    scales = signs.scales[:, layout.scale_starts[head] : layout.scale_starts[head + 1]].double()
    cells, z = cells_of(signs, encoder, head), x @ code.projection.double().T
    for group, alpha in enumerate(scales.T):
        levels, coded = group_levels(code, layout.word_groups[head], group)
        energy = (z * coded if encoder.coded_energy else x * encoder.support[group]).square().sum(1)
        expected = energy / (z * levels.gather(0, cells)).sum(1).clamp(min=1e-300)
        if encoder.norm_factor is not None:
            expected = encoder.norm_factor[group] * energy.sqrt()
        assert ((alpha - expected).abs() <= 1e-3 * expected + 2.0**-24).all()


@pytest.mark.parametrize("heads", [3, 8])
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 127, 128, 129, 1000])
def test_any_number_of_tokens(tokens: int, heads: int) -> None:
    encoder = qjl(heads=heads)
    x = vectors(tokens, encoder)
    signs = encoded(x, encoder)
    assert signs.words.shape == (tokens, encoder.layout.words)
    assert signs.scales.shape == (tokens, encoder.layout.scales)
    if tokens:
        assert_encodes(x, encoder, signs)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
def test_every_head_dim(head_dim: int) -> None:
    encoder = qjl(head_dim)
    x = vectors(300, encoder)
    assert_encodes(x, encoder, encoded(x, encoder))


@pytest.mark.parametrize("rows", [32, 160, 512, 1536])
def test_every_number_of_rows_even_one_that_does_not_fit_shared_memory(rows: int) -> None:
    encoder = qjl(rows=rows)
    x = vectors(300, encoder)
    assert_encodes(x, encoder, encoded(x, encoder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("planes", [1, 4])
def test_every_dtype_and_magnitude(dtype: torch.dtype, planes: int) -> None:
    encoder = replace(sign_encoder(128, planes, heads=3), mean=torch.zeros(3, 128))
    x = vectors(300, encoder, dtype) * torch.logspace(-30, 3, 300).view(-1, 1, 1).to(dtype)
    assert_encodes(x, encoder, encoded(x, encoder))


@pytest.mark.parametrize("planes", [1, 2, 3, 4, 5, 6])
def test_every_number_of_planes(planes: int) -> None:
    encoder = sign_encoder(128, planes, heads=3)
    x = vectors(300, encoder)
    assert_encodes(x, encoder, encoded(x, encoder))


@pytest.mark.parametrize(
    "encoder",
    [
        qjl(norm_factor=(0.1,)),
        outliers(),
        outliers(norm_factor=(0.1, 0.2)),
        ragged(),
        shuffled(),
        sign_encoder(256, 4, heads=3),
        sign_encoder(64, 2, heads=3, rows=32, coded_energy=True),
    ],
    ids=["norm", "outliers", "outliers by norm", "ragged", "shuffled", "wide planes", "few coordinates"],
)
def test_every_kind_of_code(encoder: SignEncoder) -> None:
    x = vectors(500, encoder)
    x[:, :, :8] *= 30
    assert_encodes(x, encoder, encoded(x, encoder))


@pytest.mark.parametrize("bit", [0, 31])
def test_a_flipped_row_is_found(bit: int) -> None:
    encoder = qjl()
    x = vectors(50, encoder)
    signs = encoded(x, encoder)
    z = (x[:, 1].float() - encoder.mean[1]) @ encoder.heads[0].projection[bit]
    signs.words[z.abs().argmax(), encoder.layout.word_starts[1]] ^= torch.tensor(1 << bit).int()
    with pytest.raises(AssertionError):
        assert_encodes(x, encoder, signs)


ENCODERS: dict[str, Encoder] = {
    "signs": qjl(),
    "planes": sign_encoder(128, 4, heads=3),
    "outliers": outliers(),
    "ragged": ragged(),
    "affine": affine(2),
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())


@every_encoder
def test_a_vector_is_encoded_alike_whatever_stands_beside_it(encoder: Encoder) -> None:
    x = vectors(1000, encoder).cuda()
    together = ops.encode(x, encoder)
    assert equal(ops.encode(x, encoder), together)
    for start, end in ((0, 1), (1, 2), (37, 38), (5, 133), (500, 1000), (999, 1000)):
        alone = ops.encode(x[start:end], encoder)
        assert equal(alone, Signs(together.words[start:end], together.scales[start:end]))
    shuffled = torch.randperm(1000, device="cuda")
    assert equal(ops.encode(x[shuffled], encoder), Signs(together.words[shuffled], together.scales[shuffled]))


@every_encoder
def test_strided_input(encoder: Encoder) -> None:
    x = vectors(70, encoder).cuda()
    wide = torch.stack([x + 1, x, x - 1], 1)
    together = ops.encode(x, encoder)
    assert equal(ops.encode(wide[:, 1], encoder), together)
    assert equal(ops.encode(strided(x), encoder), together)
    assert equal(ops.encode(torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x), encoder), together)


@every_encoder
def test_keys_and_values_in_one_go(encoder: Encoder) -> None:
    keys, values = vectors(3000, encoder).cuda(), vectors(3000, encoder, seed=1).cuda()
    for (signs, record), x in zip(ops.launch_pair(keys, values, encoder, encoder), (keys, values), strict=True):
        check(record, encoder.layout.heads)
        assert equal(signs, ops.encode(x, encoder))


@every_encoder
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_vector_equal_to_the_mean_has_scale_zero(encoder: Encoder, dtype: torch.dtype) -> None:
    mean = encoder.mean.half().float()
    x = vectors(40, encoder, dtype)
    x[20] = mean.to(dtype)
    encoder = replace(encoder, mean=mean)
    signs = encoded(x, encoder)
    assert signs.scales.isfinite().all()
    assert not signs.scales[20].any()
    assert torch.equal(signs.words[20], reference.encode(x, encoder).words[20])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_encoder
def test_the_first_vector_that_is_not_finite_is_named(encoder: Encoder, bad: float, dtype: torch.dtype) -> None:
    """Head 0 of two of the encoders stores nothing."""
    x = vectors(300, encoder, dtype)
    x[280, 0, 3] = x[270, 0, encoder.layout.head_dim - 1] = x[271, 1, 0] = bad
    if dtype != torch.float16:
        x[100, 1] = 3e38
    with pytest.raises(NonFiniteError, match="token 270, KV head 0"):
        encoded(x, encoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@every_encoder
def test_the_first_scale_beyond_fp16_is_named(encoder: Encoder, dtype: torch.dtype) -> None:
    x = vectors(300, encoder, dtype)
    x[120, 2] = x[120, 1] = x[200, 1] = 3e38 * normal(encoder.layout.head_dim).sign()
    with pytest.raises(ScaleRangeError, match="token 120, KV head 1"):
        encoded(x, encoder)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("planes", [1, 2, 3, 4, 8])
def test_affine_sketches_are_the_reference_s_bit_for_bit(planes: int, head_dim: int) -> None:
    encoder = affine(planes, head_dim)
    encoder = replace(encoder, mean=(encoder.mean * 8).round() / 8)
    x = vectors(1000, encoder)
    x[:200] = (x[:200] * 4).round()  # then many values lie halfway between two codes
    assert equal(encoded(x, encoder), reference.encode(x, encoder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 33, 1000])
def test_affine_of_every_dtype(tokens: int, dtype: torch.dtype) -> None:
    encoder = affine(4)
    x = vectors(tokens, encoder, dtype)
    assert equal(encoded(x, encoder), reference.encode(x, encoder))


@pytest.mark.parametrize("encoder", [qjl(heads=8), affine(4, heads=8)], ids=["signs", "affine"])
def test_more_numbers_than_32_bits_count(encoder: Encoder) -> None:
    tokens = 2**31 // (8 * 128) + 77
    x = torch.randn(tokens, 8, 128, dtype=torch.float16, device="cuda")
    signs, last = ops.encode(x, encoder), ops.encode(x[-100:], encoder)
    assert equal(Signs(signs.words[-100:], signs.scales[-100:]), last)


def test_input_of_another_shape_or_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[3, 2, 32\]"):
        ops.encode(torch.zeros(3, 2, 32).cuda(), qjl())
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        ops.encode(torch.zeros(3, 3, 128).double().cuda(), qjl())
