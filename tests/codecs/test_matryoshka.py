"""The fitted sign codec: nesting, errors, scales, what it promises to readers."""

import itertools

import numpy as np
import pytest
import torch

from kvstore_codecs.matryoshka import level_budgets
from kvstore_codecs.planes import plane_code
from kvstore_codecs.spec import Matryoshka
from kvstore_kernels.backend import Backend, ReferenceBackend
from kvstore_kernels.types import STEP, HeadEncoder, SignEncoder, SignRows, Signs
from tests.codecs import oracle
from tests.codecs.inputs import seeded
from tests.codecs.spectra import HEADS, LAYERS, as_signs, fitted_plan, matryoshka, metrics, projection, vectors

SIZES = [(64, 2.0), (64, 3.5), (128, 2.0), (32, 1.0), (96, 4.0)]


def head_of(plan_encoder: object, head: int) -> HeadEncoder:
    assert isinstance(plan_encoder, SignEncoder)
    return plan_encoder.heads[head]


@pytest.mark.parametrize(("d", "bits"), SIZES)
def test_words_and_scales_are_those_of_the_oracle(backend: Backend, d: int, bits: float):
    plan, x = as_signs(matryoshka(d, bits).of(1, "keys")), vectors(d)[0, 1, :40]
    found, expected = backend.encode(x, plan.encoder), oracle.encode(x, plan.encoder)
    assert torch.equal(found.words, expected.words)
    assert (found.scales.float() - expected.scales.float()).abs().max() <= 1e-3 * expected.scales.float().abs().max()


@pytest.mark.parametrize(("d", "bits"), SIZES)
def test_all_heads_together_store_the_budget(d: int, bits: float):
    """Planes go where they are worth most: the heads of large vectors have more."""
    plan = matryoshka(d, bits)
    layouts = [as_signs(plan.of(layer, kind)).layout for kind in ("keys", "values") for layer in range(LAYERS)]
    assert sum(layout.words for layout in layouts) == round(bits * 2 * LAYERS * HEADS * d / 32)
    with_words = sum(words != () for layout in layouts for words in layout.word_groups)
    assert plan.bytes_per_token == round(bits * 2 * LAYERS * HEADS * d / 32) * 4 + 2 * with_words
    per_head = np.array([[len(words) for words in layout.word_groups] for layout in layouts])
    assert per_head[:, 2].min() > per_head[:, 0].max()


def test_without_a_common_unit_every_head_gets_what_its_own_spectrum_is_worth():
    plan = matryoshka(64, 2.0, "none")
    assert {len(words) for words in as_signs(plan.of(0, "keys")).layout.word_groups} <= {3, 4, 5}
    assert as_signs(plan.of(0, "keys")).debias == 0.5
    assert as_signs(matryoshka(64, 2.0).of(0, "keys")).debias == 0.0


def test_a_head_may_store_nothing_and_is_read_as_its_mean(backend: Backend):
    plan = as_signs(matryoshka(64, 0.25).of(0, "keys"))
    assert () in plan.layout.word_groups
    x = vectors(64)[0, 0, :9]
    for ops in (backend, ReferenceBackend()):
        rows = SignRows(ops.encode(x, plan.encoder), plan.levels[0])
        decoded = ops.decode(rows)
        q = torch.randn(2, HEADS, 64, generator=seeded(1))
        scores = ops.score(q, rows, sm_scale=0.1)
        assert (scores - torch.einsum("thd,nhd->thn", q, decoded) * 0.1).abs().max() <= 1e-2
        for head, words in enumerate(plan.layout.word_groups):
            if not words:
                assert torch.equal(decoded[:, head], plan.levels[0].mean[head].expand(9, 64))


@pytest.mark.parametrize("bits", [0.4, 1.0, 2.0, 2.25, 3.5, 6.0])
def test_levels_read_a_bit_less_each_down_to_a_half(bits: float):
    budgets = level_budgets(bits)
    assert budgets[0] == bits
    assert all(fine - coarse == 1 for fine, coarse in itertools.pairwise(budgets))
    assert budgets[-1] >= 0.5 or len(budgets) == 1
    assert budgets[-1] - 1 < 0.5


@pytest.mark.parametrize(("d", "bits"), SIZES)
def test_a_level_reads_the_planes_that_its_budget_would_store(backend: Backend, d: int, bits: float):
    """A prefix of every head's words, whose bits are those of a coarser index; nothing behind it matters."""
    plan = as_signs(matryoshka(d, bits).of(0, "keys"))
    signs = backend.encode(vectors(d)[0, 0, :20], plan.encoder)
    for level, budget in zip(plan.levels, level_budgets(bits), strict=True):
        direct = as_signs(matryoshka(d, budget).of(0, "keys")).layout
        read = [level.read_words(head) for head in range(HEADS)]
        assert read == [len(words) for words in direct.word_groups]
        words = signs.words.clone()
        for head in range(HEADS):
            words[:, plan.layout.word_starts[head] + read[head] : plan.layout.word_starts[head + 1]] = 0x5A5A5A5A
        cut = SignRows(Signs(words, signs.scales), level)
        assert torch.equal(backend.decode(cut), backend.decode(SignRows(signs, level)))


def test_a_prefix_of_the_words_is_the_index_without_its_last_bits(backend: Backend):
    """The rows that a level reads of a coordinate are the upper bits of its stored index, bit for bit."""
    plan, x = as_signs(matryoshka(64, 4.0).of(0, "keys")), vectors(64)[0, 0, :100]
    bits = oracle.unpack(backend.encode(x, plan.encoder).words)
    assert isinstance(plan.encoder, SignEncoder)
    for head, code in enumerate(plan.encoder.heads):
        start = 32 * plan.layout.word_starts[head]
        own = bits[:, start : start + len(code.row_coordinate)]
        index = gathered(own, code, len(code.row_coordinate))
        z = oracle.project((x[:, head] - plan.encoder.mean[head]), code) / code.sigma.double()
        gain = z.square().mean(1, keepdim=True).sqrt()
        for level in plan.levels:
            rows = 32 * level.read_words(head)
            read = torch.bincount(code.row_coordinate[:rows].long(), minlength=len(code.depth))
            assert torch.equal(gathered(own, code, rows), index >> (code.depth - read))
            for coordinate in (read > 0).nonzero()[:, 0].tolist():
                depth, kept = int(code.depth[coordinate]), int(read[coordinate])
                step = STEP[depth] * 2 ** (depth - kept) if depth > 1 else 1.0
                coarse = (z[:, coordinate] / gain[:, 0] / step).floor() + 2 ** (kept - 1)
                expected = coarse.clamp(0, 2**kept - 1).long()
                found = gathered(own, code, rows)[:, coordinate]
                assert torch.equal(found, expected), (head, coordinate)


def gathered(bits: torch.Tensor, code: HeadEncoder, rows: int) -> torch.Tensor:
    """The index [N, C] that the first rows hold, read as bits of a shorter one."""
    read = torch.bincount(code.row_coordinate[:rows].long(), minlength=len(code.depth))
    coordinate = code.row_coordinate[:rows].long()
    shift = code.row_shift[:rows].long() - (code.depth.long() - read)[coordinate]
    index = torch.zeros(len(bits), len(code.depth), dtype=torch.long)
    return index.index_add(1, coordinate, bits[:, :rows].long() << shift)


@pytest.mark.parametrize(("d", "bits"), SIZES)
def test_errors_in_the_metric_fall_at_every_level(backend: Backend, d: int, bits: float):
    """Within a fifth of coding directly one bit down, a third two bits down."""
    x = vectors(d, seed=5)[0, 0, :600]

    def error(plan, level: int) -> float:
        signs = backend.encode(x, plan.encoder)
        e = (x - backend.decode(SignRows(signs, plan.levels[level]))).double()
        return torch.einsum("nhd,hde,nhe->", e, metrics(d)[0, 0].double(), e).item()

    plan = as_signs(matryoshka(d, bits).of(0, "keys"))
    errors = [error(plan, level) for level in range(len(plan.levels))]
    assert errors == sorted(errors)
    for level, budget in list(enumerate(level_budgets(bits)))[1:3]:
        direct = error(as_signs(matryoshka(d, budget).of(0, "keys")), 0)
        assert errors[level] <= direct * (1.2 if level == 1 else 1.33)


def test_errors_are_those_of_the_allocated_quantisers(backend: Backend):
    """Gaussian vectors: what a band of that depth loses of its weight, up to the scale's own share."""
    d = 64
    found = projection(d)
    plan = as_signs(matryoshka(d, 2.0).of(0, "keys"))
    x = vectors(d, seed=6)[0, 0]
    decoded = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0]))
    z = torch.einsum("nhd,hdc->nhc", (x - decoded).double(), found.basis("keys").matrix[0].double())
    for head in range(HEADS):
        code = head_of(plan.encoder, head)
        depths = torch.zeros(d // 8, dtype=torch.long)
        coded = code.depth.view(-1, 8)[:, 0].long()
        depths[: len(coded)] = coded
        weights = found.basis("keys").weights[0, head].double().view(-1, 8).sum(1)
        expected = sum(w * (plane_code(b, b).mse if b else 1.0) for w, b in zip(weights, depths.tolist(), strict=True))
        assert z[:, head].square().sum(1).mean().item() == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize(("d", "bits"), SIZES)
def test_a_key_scores_its_own_coded_norm_exactly(backend: Backend, d: int, bits: float):
    """In coded coordinates |z|^2, at full depth; scaling a key scales its scores and keeps its bits."""
    plan = as_signs(matryoshka(d, bits).of(0, "keys"))
    assert isinstance(plan.encoder, SignEncoder)
    centred = (vectors(d)[0, 0, :200] - plan.encoder.mean) * torch.logspace(-2, 2, 200)[:, None, None]
    x = centred + plan.encoder.mean
    decoded = backend.decode(SignRows(backend.encode(x, plan.encoder), plan.levels[0])) - plan.encoder.mean
    for head in range(HEADS):
        code = head_of(plan.encoder, head)
        if not len(code.depth):
            continue
        z, y = (oracle.project(rows[:, head], code) for rows in (x - plan.encoder.mean, decoded))
        assert ((z * y).sum(1) / z.square().sum(1) - 1).abs().max() <= 2e-3
    doubled = backend.encode(plan.encoder.mean + 2 * centred, plan.encoder)
    assert (doubled.words != backend.encode(x, plan.encoder).words).double().mean() <= 1e-3


@pytest.mark.parametrize(("d", "bits"), [(64, 2.0), (64, 3.0), (128, 2.0)])
def test_plans_promise_the_variance_of_stored_planes(backend: Backend, d: int, bits: float):
    """Of isotropic queries in coded coordinates; less where planes are many, as eight coordinates have no far tails."""
    plan, x = as_signs(matryoshka(d, bits).of(0, "keys")), vectors(d, seed=8)[0, 0]
    assert isinstance(plan.encoder, SignEncoder)
    signs = backend.encode(x, plan.encoder)
    for head in range(HEADS):
        code, expansion = head_of(plan.encoder, head), plan.levels[0]
        g = torch.randn(200, len(code.depth), generator=seeded(head)).double()
        q = g @ code.projection.double()
        decoded = backend.decode(SignRows(signs, expansion))[:, head] - expansion.mean[head]
        coded = oracle.project(x[:, head] - expansion.mean[head], code)
        errors = (oracle.project(decoded, code) - coded) @ g.T
        alpha = signs.scales[:, plan.layout.scale_starts[head]].double()
        promised = ((q @ expansion.matrix[head].double().T).square() @ expansion.noise[head].double()).mean()
        promised = promised * alpha.square().mean()
        assert 0.7 <= errors.square().mean().item() / promised.item() <= 1.1


def test_queries_have_twelve_bits_and_searched_budgets_are_taken():
    d, own = 64, (1, 0, 9, 2, 6, 6) * 2
    found = projection(d, "output", ((2.0, own),))
    plan = fitted_plan(Matryoshka(bits=2.0, basis=f"projection:{found.sha256}"), d, found)
    stored = [len(w) for layer in range(LAYERS) for w in as_signs(plan.of(layer, "keys")).layout.word_groups]
    assert stored == [*own[:6]]
    levels = as_signs(plan.of(0, "keys")).levels
    assert all(level.query_bits == 12 for level in levels)
    assert all(levels[1].read_words(head) <= levels[0].read_words(head) for head in range(HEADS))
