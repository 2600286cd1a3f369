import pytest
import torch

from kvstore_kernels.reference.expand import expand
from tests.kernels.inputs import assert_close, expansion, normal


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_the_largest_coordinate_is_the_largest_integer_and_none_is_off_by_more_than_half(bits: int) -> None:
    by, q = expansion(query_bits=bits), normal(3, 6, 64)
    for head, own in enumerate(expand(q, by)):
        y = q.double()[:, 3 * head : 3 * head + 3].flatten(0, 1) @ by.matrix[head].double().T
        assert torch.equal(own.ints.abs().amax(1), torch.full((9,), 2.0 ** (bits - 1) - 1))
        assert torch.equal(own.ints, own.ints.round())
        assert ((own.ints * own.step.unsqueeze(1) - y).abs() <= own.step.unsqueeze(1) * 0.5001).all()


def test_halves_round_to_even() -> None:
    by = expansion((1,), 32, query_bits=8)
    by.matrix[0].copy_(torch.eye(32))
    q = torch.zeros(1, 1, 32)
    q[0, 0, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, 3.5])
    assert expand(q, by)[0].ints[0, :5].tolist() == [127, 0, 2, -2, 4]


@pytest.mark.parametrize("tiny", [0.0, 1e-42])
def test_a_query_of_zeros_or_of_what_gpus_flush_has_zero_integers_and_step(tiny: float) -> None:
    own = expand(torch.full((1, 2, 64), tiny), expansion())[1]
    assert not own.ints.any()
    assert not own.step.any()


def test_a_query_does_not_depend_on_the_queries_around_it() -> None:
    by, q = expansion((4, 2), groups=2, offsets=True), normal(7, 6, 64)
    together = expand(q, by)
    for token in range(7):
        alone = expand(q[token : token + 1], by)
        for own, all_rows in zip(alone, together, strict=True):
            for name, value in vars(own).items():
                assert torch.equal(value, getattr(all_rows, name)[3 * token : 3 * token + 3]), name


def test_noise_sums_the_rows_of_each_group() -> None:
    by, q = expansion((3, 3), groups=2), normal(1, 2, 64)
    own = expand(q, by)[0]
    squares = by.noise[0].double() * (by.matrix[0].double() @ q[0, 0].double()).square()
    expected = torch.stack([squares[:32].sum() + squares[64:].sum(), squares[32:64].sum()])
    assert_close(own.noise[0].double(), expected, rtol=1e-6, atol=0)


def test_a_level_reads_the_first_words_only() -> None:
    q, level = normal(1, 2, 64), expansion((4, 4), read=(2, 0))
    own = expand(q, level)
    assert own[0].ints.shape == (1, 64)
    assert own[1].ints.shape == (1, 0)
    assert torch.equal(own[1].mean, expand(q, expansion((4, 4)))[1].mean)


def test_a_head_without_words_has_its_mean_only() -> None:
    own = expand(normal(2, 4, 64), expansion((4, 0), groups=2, offsets=True))[1]
    assert own.ints.shape == (4, 0)
    assert own.offsets.shape == (4, 0)
    assert not own.step.any()
    assert own.mean.all()


@pytest.mark.parametrize("shape", [(2, 64), (1, 3, 64), (1, 2, 32), (1, 0, 64)])
def test_a_query_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="q has shape"):
        expand(torch.zeros(shape), expansion())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_queries_are_read_as_their_float32_values(dtype: torch.dtype) -> None:
    q = normal(2, 2, 64).to(dtype)
    assert torch.equal(expand(q, expansion())[0].ints, expand(q.float(), expansion())[0].ints)
