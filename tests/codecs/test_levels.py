"""Levels: any prefix of a sketch is a coarser sketch."""

import pytest
import torch

from kvstore_codecs.planes import plane_code
from kvstore_codecs.qjl import level_rows
from kvstore_codecs.spec import Affine, Qjl, Rotated
from kvstore_kernels.backend import Backend
from kvstore_kernels.types import AffineEncoder, SignEncoder, SignRows, Signs
from tests.codecs import oracle
from tests.codecs.inputs import SignCodec, seeded, sign_plan

CODECS = [
    (Qjl(bits=256), 128),
    (Qjl(bits=512, outlier_channels=(0, 127)), 128),
    (Rotated(planes=6), 64),
    (Affine(planes=4), 96),
]


@pytest.mark.parametrize(("codec", "d"), CODECS, ids=str)
def test_every_level_reads_a_shorter_prefix_of_the_same_words(codec: SignCodec, d: int):
    plan = sign_plan(codec, d)
    words = [level.read_words(0) for level in plan.levels]
    assert words[0] == plan.layout.words
    assert words == sorted(set(words), reverse=True)
    assert all(level.layout == plan.layout for level in plan.levels)


@pytest.mark.parametrize(
    ("bits", "d", "expected"),
    [
        (256, 128, (256, 128, 64, 32)),
        (384, 128, (384, 256, 128, 64, 32)),
        (160, 128, (160, 128, 64, 32)),
        (256, 96, (256, 192, 96, 64, 32)),
        (32, 256, (32,)),
    ],
)
def test_qjl_levels_end_with_whole_blocks_where_they_can(bits: int, d: int, expected: tuple[int, ...]):
    assert level_rows(bits, d) == expected


@pytest.mark.parametrize(("codec", "d"), CODECS, ids=str)
def test_reading_a_prefix_needs_no_other_words(backend: Backend, codec: SignCodec, d: int):
    """Whatever lies behind a level's prefix does not change what it decodes or scores."""
    plan = sign_plan(codec, d)
    signs = backend.encode(torch.randn(9, 1, d, generator=seeded(1)), plan.encoder)
    q = torch.randn(2, 1, d, generator=seeded(2))
    for level in plan.levels:
        words = signs.words.clone()
        words[:, level.read_words(0) :] = 0x5A5A5A5A
        whole, cut = SignRows(signs, level), SignRows(Signs(words, signs.scales), level)
        assert torch.equal(backend.decode(cut), backend.decode(whole))
        assert torch.equal(backend.score(q, cut, sm_scale=1.0), backend.score(q, whole, sm_scale=1.0))


@pytest.mark.parametrize("scale", ["ip", "paper"])
@pytest.mark.parametrize("stored", [256, 512])
def test_a_qjl_prefix_is_the_sketch_of_that_many_rows(backend: Backend, stored: int, scale):
    """Same bits; the same scores too under the norm rule, and up to one factor a token under the other."""
    x = torch.randn(200, 1, 128, generator=seeded(3))
    plan = sign_plan(Qjl(bits=stored, scale=scale), 128)
    signs = backend.encode(x, plan.encoder)
    for level, rows in enumerate(level_rows(stored, 128)):
        direct = sign_plan(Qjl(bits=rows, scale=scale), 128)
        expected = backend.encode(x, direct.encoder)
        assert torch.equal(signs.words[:, : rows // 32], expected.words)
        read = backend.decode(SignRows(signs, plan.levels[level]))[:, 0]
        alone = backend.decode(SignRows(expected, direct.levels[0]))[:, 0]
        factor = (read * alone).sum(dim=1) / alone.square().sum(dim=1)
        assert (read - factor[:, None] * alone).abs().max() <= 1e-5 * alone.abs().max()
        assert (factor - 1).abs().max() <= (1e-3 if scale == "paper" else 0.35)


def test_a_rotated_prefix_is_the_index_without_its_last_bits(backend: Backend):
    """Plane p of the stored index is bit b - 1 - p, so that dropping planes shifts the index."""
    d, planes = 64, 4
    plan = sign_plan(Rotated(planes=planes), d)
    assert isinstance(plan.encoder, SignEncoder)
    x = torch.randn(100, 1, d, generator=seeded(4))
    bits = oracle.unpack(backend.encode(x, plan.encoder).words).view(100, planes, d)
    z = oracle.project(x[:, 0], plan.encoder.heads[0])
    places = 2 ** torch.arange(planes - 1, -1, -1)
    index = (bits * places[:, None]).sum(dim=1)
    for read in range(1, planes + 1):
        coarse = (bits[:, :read] * places[planes - read :, None]).sum(dim=1)
        assert torch.equal(coarse, index >> (planes - read))
    order = z.argsort(dim=1)
    assert (index.gather(1, order).diff(dim=1) >= 0).all()


@pytest.mark.parametrize(("stored", "errors"), [(2, (0.1175, 0.3634)), (3, (0.0374, 0.1246, 0.3634))])
def test_prefix_errors_on_normal_coordinates(backend: Backend, stored: int, errors: tuple[float, ...]):
    """With each level's best gain for the whole set, 256 channels being nearly normal."""
    x = torch.randn(4000, 1, 256, generator=seeded(5))
    plan = sign_plan(Rotated(planes=stored), 256)
    signs = backend.encode(x, plan.encoder)
    for level, error in zip(plan.levels, errors, strict=True):
        decoded = backend.decode(SignRows(signs, level)).double()
        gain = (x * decoded).sum() / decoded.square().sum()
        assert ((x - gain * decoded).square().mean() / x.square().mean()).item() == pytest.approx(error, rel=0.02)
        read = level.read_words(0) * 32 // 256
        assert gain.item() == pytest.approx(1 - plane_code(stored, read).mse, rel=0.01)


@pytest.mark.parametrize("planes", [2, 4, 8])
def test_an_affine_prefix_lies_in_the_middle_of_the_codes_it_may_be(backend: Backend, planes: int):
    """Reading r of b planes is within half of 2^(b - r) steps of the finest reading."""
    plan = sign_plan(Affine(planes=planes), 64)
    assert isinstance(plan.encoder, AffineEncoder)
    signs = backend.encode(torch.randn(300, 1, 64, generator=seeded(6)), plan.encoder)
    finest = backend.decode(SignRows(signs, plan.levels[0]))
    step = 2 * signs.scales[:, :2].float().repeat_interleave(32, dim=1)
    for level, expansion in enumerate(plan.levels):
        distance = (backend.decode(SignRows(signs, expansion)) - finest).abs()[:, 0]
        assert (distance <= step * (2**level - 1) / 2 * 1.001 + 1e-6).all()
