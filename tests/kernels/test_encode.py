from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvstore_kernels.backend import Backend, ReferenceBackend, cpu_backend
from kvstore_kernels.types import (
    STEP,
    AffineEncoder,
    Encoder,
    NonFiniteError,
    ScaleRangeError,
    SignEncoder,
    SignLayout,
    Signs,
)
from tests.kernels.inputs import assert_close, normal, sign_encoder, signs64, strided


def affine_encoder(planes: int, head_dim: int = 64, heads: int = 2) -> AffineEncoder:
    groups = head_dim // 32
    layout = SignLayout(head_dim, groups, (tuple(range(groups)) * planes,) * heads, has_offsets=True)
    return AffineEncoder(layout, planes, normal(heads, head_dim, seed=3))


def outlier_encoder() -> SignEncoder:
    """Channels below 8 have the second of two groups, with 32 of 96 rows."""
    base = sign_encoder(rows=96)
    support = torch.stack([torch.arange(64) >= 8, torch.arange(64) < 8]).float()
    mask = torch.cat([support[:1].expand(64, 64), support[1:].expand(32, 64)])
    head = replace(base.heads[0], projection=base.heads[0].projection * mask)
    layout = SignLayout(64, 2, ((0, 0, 1),) * 2)
    return SignEncoder(layout, (head,) * 2, base.mean, support)


def ragged_encoder() -> SignEncoder:
    """Heads of 0, 2 and 8 words; the last has coordinates of 4, 3, 1 and 0 planes, its own most significant first."""
    few, deep = sign_encoder().heads[0], sign_encoder(planes=4).heads[0]
    depth = torch.tensor([4] * 32 + [3] * 32 + [1] * 32 + [0] * 32, dtype=torch.int32)
    rows = [(c, depth[c] - 1 - plane) for plane in range(4) for c in range(128) if depth[c] > plane]
    mixed = replace(
        deep,
        projection=torch.cat([deep.projection, few.projection.flip(0)]),
        depth=depth,
        sigma=torch.ones(128),
        row_coordinate=torch.tensor([c for c, _ in rows], dtype=torch.int32),
        row_shift=torch.tensor([int(shift) for _, shift in rows], dtype=torch.int32),
        row_weight=torch.tensor([0.1 * 2.0**shift for _, shift in rows]),
    )
    layout = SignLayout(64, 1, ((), (0,) * 2, (0,) * 8))
    return SignEncoder(layout, (few, few, mixed), normal(3, 64, seed=3), torch.ones(1, 64), coded_energy=True)


ENCODERS: dict[str, Encoder] = {
    "one plane": sign_encoder(),
    "four planes": sign_encoder(planes=4),
    "more rows than channels": sign_encoder(rows=160),
    "norm": sign_encoder(norm_factor=(0.1,)),
    "coded energy": sign_encoder(planes=2, rows=32, coded_energy=True),
    "outliers": outlier_encoder(),
    "ragged": ragged_encoder(),
    "affine 2": affine_encoder(2),
    "affine 8": affine_encoder(8),
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())


def vectors(tokens: int, encoder: Encoder, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(tokens, encoder.layout.heads, encoder.layout.head_dim).to(dtype)


def equal(a: Signs, b: Signs) -> bool:
    return torch.equal(a.words, b.words) and torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_one_plane_is_the_sign_of_the_projection(backend: Backend, head_dim: int) -> None:
    encoder = sign_encoder(head_dim)
    x = normal(40, 2, head_dim)
    z = (x - encoder.mean).double() @ encoder.heads[0].projection.double().T
    words = backend.encode(x, encoder).words
    assert torch.equal(signs64(words).view(40, 2, head_dim) > 0, z > 0)


def test_a_projection_of_zero_is_bit_0(backend: Backend) -> None:
    base = sign_encoder()
    encoder = replace(base, heads=(replace(base.heads[0], projection=torch.eye(64)),) * 2, mean=torch.zeros(2, 64))
    x = torch.zeros(1, 2, 64)
    x[..., 5] = 1.0
    assert backend.encode(x, encoder).words.tolist() == [[32, 0, 32, 0]]


@pytest.mark.parametrize("planes", [2, 3, 4, 5, 6])
def test_planes_are_the_natural_binary_index_of_a_uniform_quantiser(backend: Backend, planes: int) -> None:
    encoder = sign_encoder(planes=planes)
    head, x = encoder.heads[0], normal(50, 2, 64)
    z = (x - encoder.mean).double() @ head.projection.double().T / head.sigma.double()
    index = torch.floor(z / (STEP[planes] * z.square().mean(2, keepdim=True).sqrt())) + 2 ** (planes - 1)
    bits = (signs64(backend.encode(x, encoder).words).view(50, 2, planes, 64) > 0).long()
    stored = (bits << torch.arange(planes - 1, -1, -1).view(-1, 1)).sum(2)
    assert torch.equal(stored, index.clamp(0, 2**planes - 1).long())


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_the_inner_product_of_a_vector_with_its_reconstruction_is_its_energy(backend: Backend, planes: int) -> None:
    encoder = sign_encoder(planes=planes)
    head, x = encoder.heads[0], normal(30, 2, 64) * torch.logspace(-3, 3, 30).view(-1, 1, 1)
    centred = (x - encoder.mean).double()
    signs = backend.encode(x, encoder)
    y = (signs64(signs.words).view(30, 2, planes, 64) * head.row_weight.double().view(planes, 64)).sum(2)
    rebuilt = signs.scales.double().unsqueeze(2) * y @ head.projection.double()
    energy = centred.square().sum(2)
    assert_close((rebuilt * centred).sum(2), energy, rtol=1e-3, atol=0)


def test_the_norm_rule_stores_a_multiple_of_the_norm(backend: Backend) -> None:
    encoder, x = sign_encoder(norm_factor=(0.25,)), normal(20, 2, 64)
    expected = 0.25 * (x - encoder.mean).norm(dim=2)
    assert_close(backend.encode(x, encoder).scales.float(), expected, rtol=1e-3, atol=0)


def test_coded_energy_leaves_out_what_the_projection_drops(backend: Backend) -> None:
    encoder, x = sign_encoder(rows=32, coded_energy=True), normal(20, 2, 64)
    z = (x - encoder.mean) @ encoder.heads[0].projection.T
    expected = z.square().sum(2) / (z.abs() * encoder.heads[0].row_weight).sum(2)
    assert_close(backend.encode(x, encoder).scales.float(), expected, rtol=1e-3, atol=0)


def test_a_group_is_encoded_from_its_own_channels(backend: Backend) -> None:
    encoder, x = outlier_encoder(), normal(20, 2, 64)
    louder = x.clone()
    louder[:, :, :8] *= 50
    a, b = backend.encode(x, encoder), backend.encode(louder, encoder)
    assert torch.equal(a.scales[:, ::2], b.scales[:, ::2])
    assert (b.scales[:, 1::2] > 5 * a.scales[:, 1::2]).all()
    assert torch.equal(a.words.view(20, 2, 3)[..., :2], b.words.view(20, 2, 3)[..., :2])


@pytest.mark.parametrize("planes", [1, 2, 4, 8])
def test_affine_rebuilds_within_half_a_code_step(backend: Backend, planes: int) -> None:
    encoder, x = affine_encoder(planes), normal(40, 2, 64)
    signs = backend.encode(x, encoder)
    alpha, beta = signs.scales.double().view(40, 2, 2, 2).unbind(2)
    weights = 2.0 ** torch.arange(planes - 1, -1, -1, dtype=torch.float64)
    codes = (signs64(signs.words).view(40, 2, planes, 2, 32) * weights.view(-1, 1, 1)).sum(2)
    error = beta.unsqueeze(3) + alpha.unsqueeze(3) * codes - (x - encoder.mean).double().unflatten(2, (2, 32))
    fp16 = 2.0**-11 * ((2**planes - 1) * alpha + beta.abs())
    assert (error.abs() <= (alpha + fp16).unsqueeze(3)).all()


def test_a_constant_affine_group_is_exact(backend: Backend) -> None:
    encoder = replace(affine_encoder(2), mean=torch.zeros(2, 64))
    signs = backend.encode(torch.full((3, 2, 64), 1.5), encoder)
    assert signs.scales[0].tolist() == [0.0, 0.0, 1.5, 1.5] * 2


@every_encoder
def test_a_vector_equal_to_the_mean_has_scale_zero(backend: Backend, encoder: Encoder) -> None:
    x = vectors(5, encoder)
    x[2] = encoder.mean
    scales = backend.encode(x, encoder).scales
    assert scales.isfinite().all()
    assert not scales[2].any()


@every_encoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_sketches_are_the_reference_s_bit_for_bit(encoder: Encoder, dtype: torch.dtype) -> None:
    x = vectors(260, encoder, dtype)
    assert equal(cpu_backend().encode(x, encoder), ReferenceBackend().encode(x, encoder))


@every_encoder
def test_vectors_one_by_one_are_encoded_as_all_at_once(backend: Backend, encoder: Encoder) -> None:
    x = vectors(259, encoder)
    together = backend.encode(x, encoder)
    for token in (0, 1, 2, 100, 255, 256, 258):
        alone = backend.encode(x[token : token + 1], encoder)
        assert equal(alone, Signs(together.words[token : token + 1], together.scales[token : token + 1]))


@every_encoder
def test_strided_and_empty_input(backend: Backend, encoder: Encoder) -> None:
    x = vectors(9, encoder)
    assert equal(backend.encode(strided(x), encoder), backend.encode(x, encoder))
    empty = backend.encode(x[:0], encoder)
    assert empty.words.shape == (0, encoder.layout.words)
    assert empty.scales.shape == (0, encoder.layout.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_encoder
def test_the_first_vector_that_is_not_finite_is_named(
    backend: Backend, encoder: Encoder, bad: float, dtype: torch.dtype
) -> None:
    x = vectors(300, encoder, dtype)
    x[280, 0, 3] = bad
    x[270, 1, 63] = bad
    with pytest.raises(NonFiniteError, match="token 270, KV head 1"):
        backend.encode(x, encoder)


@every_encoder
def test_the_first_scale_beyond_fp16_is_named(backend: Backend, encoder: Encoder) -> None:
    x = vectors(6, encoder)
    x[2, 1] = x[4, 1] = 3e38 * normal(64).sign()
    with pytest.raises(ScaleRangeError, match="token 2, KV head 1"):
        backend.encode(x, encoder)


def test_input_of_another_shape_is_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"x has shape \[3, 2, 32\]"):
        backend.encode(torch.zeros(3, 2, 32), sign_encoder())
