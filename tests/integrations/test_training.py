"""Training of projections on a tiny model: what is learned, what stays true, and going on after a stop."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.projections import checkpoint
from kvstore_client.projections.allotment import allotted
from kvstore_client.projections.bases import TrainableBases
from kvstore_client.projections.export import digest_of_texts, trained_projection
from kvstore_client.projections.fit import gather, projection_of
from kvstore_client.projections.quality import measure
from kvstore_client.projections.rows import CodecRow
from kvstore_client.projections.search import Divergence
from kvstore_client.projections.student import Sample
from kvstore_client.projections.surrogates import Codec
from kvstore_client.projections.training import BUDGETS, Training, TrainingSettings
from kvstore_codecs.artifact import Metric, Projection, read_projection
from kvstore_kernels.backend import cpu_backend

from .tiny import tiny_llama, token_ids

LENGTH = 96
TEXTS = [token_ids(LENGTH, seed) for seed in range(4)]
SAMPLES = [Sample.whole(ids) for ids in TEXTS]
DATA = digest_of_texts(TEXTS)


@cache
def model() -> Any:
    return tiny_llama().requires_grad_(False)


@cache
def start(metric: Metric = "output") -> Projection:
    gatherer = gather(model(), TEXTS, lambda done: None)
    return read_projection(projection_of(model(), gatherer, TEXTS, metric, LENGTH))


def settings(codec: Codec = "projected", steps: int = 6, **changes: Any) -> TrainingSettings:
    base = TrainingSettings(codec, steps, BUDGETS[codec], kl_share=1.0, learning_rate=1e-2, warmup_steps=2)
    return replace(base, **changes)


def trained(chosen: TrainingSettings, metric: Metric = "output") -> Training:
    training = Training(model(), start(metric), chosen)
    for _ in training.run(SAMPLES):
        pass
    return training


def exported(training: Training) -> bytes:
    return trained_projection(training.start, training.bases, TEXTS, "train", training.settings.seed, {"steps": 6.0})


@pytest.mark.parametrize(("codec", "row"), [("matryoshka", "both:matryoshka:1.5"), ("projected", "both:projected:0.5")])
def test_a_student_costs_what_the_codec_itself_costs(codec: Codec, row: str) -> None:
    """Before any training: the functions that gradients go through against the encoder and decoder."""
    _, _, budget = row.split(":")
    student = Divergence(model(), start(), codec, SAMPLES[:2])(allotted(codec, start(), float(budget)))
    made = {row: CodecRow.parse(row, shape_of(model()), {"one": start()}, cpu_backend())}
    assert student == pytest.approx(measure(model(), TEXTS[:2], made)[row].kl, rel=0.01)
    other = Divergence(model(), start(), codec, SAMPLES[:2])(allotted(codec, start(), 1.1 * float(budget)))
    assert other != pytest.approx(student, rel=0.01)


@pytest.mark.parametrize(("codec", "metric"), [("projected", "none"), ("matryoshka", "output")])
def test_training_lowers_the_loss_and_bases_stay_orthogonal(codec: Codec, metric: Metric) -> None:
    training = trained(settings(codec, steps=60), metric)
    assert fmean(training.losses[-10:]) < 0.97 * fmean(training.losses[:10])
    turn = training.bases.turn.detach()
    assert (turn - torch.eye(turn.shape[-1])).abs().max() > 0.01
    assert (turn.mT @ turn - torch.eye(turn.shape[-1])).abs().max() <= 1e-5
    found = read_projection(exported(training)).basis("keys").matrix
    if metric == "none":
        assert (found.mT @ found - torch.eye(found.shape[-1])).abs().max() <= 1e-5
    else:
        assert (found.mT @ found - torch.eye(found.shape[-1])).abs().max() > 0.1


def test_weights_of_trained_bases_are_mean_squares_of_their_coordinates() -> None:
    training = trained(settings(steps=4))
    found = training.bases.exactly()
    gatherer = gather(model(), TEXTS, lambda done: None)
    for layer, statistics in enumerate(gatherer.layers):
        shift = (statistics.keys.mean - found.mean[0, layer]).unsqueeze(2)
        about = statistics.keys.covariance + shift @ shift.mT
        basis = found.basis[0, layer]
        expected = (basis.mT @ about @ basis).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(found.weights[0, layer], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_a_turn_by_nearly_half_a_circle_is_orthogonal_too() -> None:
    """Where Cayley's map of a whole basis would lose all digits: eigenvalues next to -1."""
    bases = TrainableBases(start())
    with torch.no_grad():
        bases.parametrizations.turn.original.add_(2e3 * torch.ones(32, 32).tril(-1))  # type: ignore[union-attr]
    turn = bases.exactly().basis.mT @ bases.exactly().inverse.mT
    assert (turn - torch.eye(32)).abs().max() <= 1e-5


def test_equal_seeds_give_equal_files_and_others_do_not() -> None:
    once = exported(trained(settings()))
    assert exported(trained(settings())) == once
    assert exported(trained(settings(seed=1))) != once


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_training_ends_bit_for_bit_as_an_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    whole, file = trained(settings("matryoshka")), tmp_path / "state"
    begun = Training(model(), start(), settings("matryoshka"))
    for step in begun.run(SAMPLES):
        if step.number == stop:
            checkpoint.save(begun, file, DATA)
            break
    resumed = Training(model(), start(), settings("matryoshka"))
    checkpoint.restore(resumed, file, DATA)
    assert resumed.done == stop
    for _ in resumed.run(SAMPLES):
        pass
    assert resumed.losses == whole.losses
    assert exported(resumed) == exported(whole)


def test_a_training_that_forgets_its_optimizer_ends_elsewhere(tmp_path: Path) -> None:
    """The comparison above would notice."""
    begun = Training(model(), start(), settings())
    for step in begun.run(SAMPLES):
        if step.number == 4:
            break
    resumed = Training(model(), start(), settings())
    resumed.bases.load_state_dict(begun.bases.state_dict())
    resumed.losses = [*begun.losses]
    for _ in resumed.run(SAMPLES):
        pass
    assert exported(resumed) != exported(trained(settings()))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    file, junk = tmp_path / "state", tmp_path / "junk"
    checkpoint.save(Training(model(), start(), settings()), file, DATA)
    with pytest.raises(ValueError, match="of a training with steps 6, this one has 7"):
        checkpoint.restore(Training(model(), start(), settings(steps=7)), file, DATA)
    with pytest.raises(ValueError, match="with data "):
        checkpoint.restore(Training(model(), start(), settings()), file, "other")
    junk.write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk is no checkpoint"):
        checkpoint.restore(Training(model(), start(), settings()), junk, DATA)


def test_every_text_is_learned_from_before_any_comes_again() -> None:
    training = Training(model(), start(), settings(batch=2))
    seen = []
    for done in range(4):
        training.losses = [0.0] * done
        seen += training._drawn(4)
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]


def test_a_trained_projection_says_what_it_was_made_of() -> None:
    header = read_projection(exported(trained(settings()))).header
    assert header.method == f"train from {start().sha256[:12]} (fit)"
    assert (header.seed, header.data_sha256, header.max_position) == (0, DATA, LENGTH)
    assert header.measured == {"steps": 6.0}
    assert (header.budgets, header.shares, header.has_metrics) == ((), (), True)
