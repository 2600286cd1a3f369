"""Bases: orthonormal, the same bytes everywhere, random enough."""

import hashlib
import math

import pytest
import torch
from torch import Tensor

from kvstore_codecs.basis import block_orthogonal, gaussian_table, haar, hadamard, orthonormal
from tests.codecs.inputs import seeded

BASES = ("haar", "hadamard")


def sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def test_gaussian_table_has_its_golden_bytes():
    assert hashlib.sha256(gaussian_table().astype("<f8").tobytes()).hexdigest() == (
        "809d53a690a2d233677f367a9db7179fcb2c6867fd11b55b3275f750a55d52d6"
    )


@pytest.mark.parametrize(
    ("basis", "d", "golden"),
    [
        ("haar", 8, "cb7249fcdebbf820f588185a09aaafd4c64891a9970c7e75eb51d7ce45b764aa"),
        ("haar", 64, "cc75725cb485510c818bbe49a321a1b9a638276fd8a339f6fa04f01fbeb20aea"),
        ("haar", 128, "aa14eda285ca4abd0348e073e42e75319d0304794c429125d2ddb2e3fae0391a"),
        ("haar", 256, "65d65c578260fee41c5e59461dd8f90c1d96a9d0f3e08caf35a9fc200a1cbda7"),
        ("hadamard", 64, "ed586774b321d16a418db3346f3445924b502cd32f3d9c70b63992f561a45e96"),
        ("hadamard", 96, "d75b7577b85ce4b252ef79486170b70c61ca2576213957be78bfdab60270bdf8"),
        ("hadamard", 128, "018347f88dc9bec160e0ba1d1773acc429e5baad9480c02d256ca8daee2808d5"),
        ("hadamard", 160, "a5ae6c94e3fde8545bb480a3f5304c9ad758226686b301570d33b51fc0ee3f4f"),
        ("hadamard", 224, "f7b6222052ac66bdc6d2013f20878f2495197728acef4bea7b7189b214ad3a26"),
        ("hadamard", 256, "f334dc9710490d915a9aebf21a72e6900a9e220c889bf50bb4f332d2d21b8a49"),
    ],
)
def test_basis_has_its_golden_bytes(basis: str, d: int, golden: str):
    assert sha(orthonormal(basis, d, "golden")) == golden


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_basis_bytes_do_not_depend_on_the_number_of_threads(threads: int):
    before = torch.get_num_threads()
    expected = [sha(orthonormal(basis, 96, "threads")) for basis in BASES]
    torch.set_num_threads(threads)
    try:
        assert [sha(orthonormal(basis, 96, "threads")) for basis in BASES] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("d", [1, 2, 3, 8, 32, 64, 96, 128, 160, 224, 256])
def test_basis_is_orthonormal(basis: str, d: int):
    q = orthonormal(basis, d, "x").double()
    assert (q @ q.T - torch.eye(d)).abs().max() <= 1e-6


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("rows", "d"), [(128, 128), (512, 128), (160, 128), (32, 256), (256, 96), (64, 5)])
def test_sketch_matrix_has_orthogonal_blocks_of_length_sqrt_d(basis: str, rows: int, d: int):
    s = block_orthogonal(basis, rows, d, "x").double()
    assert s.shape == (rows, d)
    for start in range(0, rows, d):
        block = s[start : start + d]
        assert (block @ block.T / d - torch.eye(len(block))).abs().max() <= 1e-5


@pytest.mark.parametrize("basis", BASES)
def test_seeds_and_blocks_differ(basis: str):
    first, second = block_orthogonal(basis, 64, 32, "0/0/keys").split(32)
    assert not torch.equal(first.abs(), second.abs()) or not torch.equal(first, second)
    assert not torch.equal(orthonormal(basis, 32, "0/0/keys"), orthonormal(basis, 32, "0/0/values"))


def test_haar_entries_have_the_moments_of_the_haar_measure():
    """E u = 0, E u^2 = 1/d, E u^4 = 3 / (d (d + 2)) for every entry; rows, columns and signs alike."""
    d, count = 8, 4000
    draws = torch.stack([haar(d, f"moments/{i}") for i in range(count)]).double()
    for power, expected in ((1, 0.0), (2, 1 / d), (4, 3 / (d * (d + 2)))):
        values = draws**power
        assert ((values.mean(0) - expected).abs() <= 5 * values.std(0) / math.sqrt(count)).all()
    determinants = torch.linalg.det(draws).sign()
    assert abs(determinants.mean()) <= 5 / math.sqrt(count)


@pytest.mark.parametrize("d", [64, 96, 128])
def test_hadamard_spreads_a_single_channel_evenly(d: int):
    """Any one channel reaches every coordinate; with an odd factor, cosines make that uneven by at most sqrt(2)."""
    columns = hadamard(d, "x").abs() * math.sqrt(d)
    limit = 1.0 if d & (d - 1) == 0 else math.sqrt(2)
    assert columns.max() <= limit + 1e-6


def test_each_further_sign_stage_leaves_the_same_share_of_the_residual():
    """r <- r - a R^T sgn(R r) with its own Hadamard each time: (1 - 2/pi)^j of the energy after j stages."""
    d = 128
    residual = torch.randn(4000, d, generator=seeded(3), dtype=torch.float64)
    energy = residual.square().sum()
    for stage in range(1, 5):
        rotation = hadamard(d, f"stage/{stage}").double()
        z = residual @ rotation.T
        residual = residual - z.abs().mean(dim=1, keepdim=True) * z.sign() @ rotation
        assert residual.square().sum() / energy == pytest.approx((1 - 2 / math.pi) ** stage, rel=0.04)
