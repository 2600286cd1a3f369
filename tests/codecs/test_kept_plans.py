import torch

from kvstore_codecs.fit import fit_session
from kvstore_codecs.kept_plans import KeptPlans
from kvstore_codecs.plan import CodecPlan, Fit
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import CodecSpec, Matryoshka, ModelShape

SHAPE = ModelShape(layers=1, kv_heads=2, query_heads=2, head_dim=64, dtype="float16", sm_scale=0.125)


def plan(seed: int) -> CodecPlan:
    spec = CodecSpec(keys=Matryoshka(bits=2), values=Matryoshka(bits=2), fit_tokens=512)
    keys, values = torch.randn(2, 1, 600, 2, 64, generator=torch.Generator().manual_seed(seed))
    fit: Fit = fit_session(spec, keys, values, 4, ())
    return plan_for(spec, SHAPE, fit)


def test_the_least_recently_used_plan_goes_when_bytes_are_over_the_bound() -> None:
    plans = [plan(seed) for seed in range(4)]
    kept, made = KeptPlans(plans[0].matrix_bytes * 5 // 2, 64), list[int]()

    def get(number: int) -> CodecPlan:
        return kept.get(number, lambda: made.append(number) or plans[number])

    for number in (0, 1, 0, 2, 0, 1):
        assert get(number) is plans[number]
    assert made == [0, 1, 2, 1]
    assert kept.bytes <= plans[0].matrix_bytes * 5 // 2


def test_one_plan_larger_than_the_bound_is_kept_alone() -> None:
    kept, one = KeptPlans(1, 64), plan(0)
    assert all(kept.get("one", lambda: one) is one for _ in range(2))


def test_small_plans_are_bounded_in_number() -> None:
    kept, made = KeptPlans(2**30, 2), list[int]()
    one = plan(0)
    for number in (0, 1, 2, 0, 2):
        assert kept.get(number, lambda number=number: made.append(number) or one) is one
    assert made == [0, 1, 2, 0]


def test_bytes_of_a_plan_are_those_of_its_matrices() -> None:
    """Encoder [C, D], and a level's E [m, D] for each of two bits a number, for keys and values."""
    floats = plan(0).matrix_bytes // 4
    assert 2 * 2 * 64 * (64 + 64) < floats < 2 * 2 * 64 * (64 + 2 * 128)
