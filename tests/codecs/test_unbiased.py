"""Estimates are unbiased at every angle and level; pairs at rho = 0 alone would hide a wrong factor."""

import pytest

from kvstore_codecs.spec import Qjl, Rotated
from tests.codecs.gaussian import gaussian_estimates
from tests.codecs.inputs import RHOS, SignCodec, estimates

IP_CODECS = [
    (Qjl(bits=256), 128),
    (Qjl(bits=256, basis="hadamard"), 128),
    (Qjl(bits=160), 128),
    (Qjl(bits=128), 64),
    (Qjl(bits=96), 96),
    (Qjl(bits=256, outlier_channels=(0, 5, 9, 100)), 128),
    (Rotated(planes=1), 128),
    (Rotated(planes=2), 128),
    (Rotated(planes=3), 128),
    (Rotated(planes=4), 128),
    (Rotated(planes=3, basis="haar"), 128),
    (Rotated(planes=3), 96),
    (Rotated(planes=6), 64),
]


@pytest.mark.parametrize(("codec", "d"), IP_CODECS, ids=str)
def test_every_level_is_unbiased_at_every_angle(codec: SignCodec, d: int):
    found = estimates(codec, d)
    for level in range(len(found.values)):
        assert max(map(abs, found.mean_errors_in_sd(level))) <= 4, f"level {level}"


@pytest.mark.parametrize(("bits", "d"), [(256, 128), (128, 64)])
def test_the_papers_constant_overestimates_by_a_quarter_of_a_channel(bits: int, d: int):
    """sqrt(pi/2) belongs to Gaussian rows; orthogonal ones come out 1 + 1/(4 d) too large, at every level."""
    found = estimates(Qjl(bits=bits, scale="paper"), d)
    for level in range(len(found.values)):
        expected = [rho * (1 + 1 / (4 * d)) for rho in RHOS]
        assert max(map(abs, found.mean_errors_in_sd(level, expected))) <= 4, f"level {level}"


@pytest.mark.parametrize("bits", [128, 256])
def test_gaussian_rows_with_the_papers_constant_are_unbiased(bits: int):
    assert max(map(abs, gaussian_estimates(bits).mean_errors_in_sd(0))) <= 4
