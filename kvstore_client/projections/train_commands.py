"""`kvstore projections train` and `search`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kvstore_client.projections import checkpoint, commands
from kvstore_client.projections.allotment import check_budgets
from kvstore_client.projections.export import digest_of_texts, searched_projection, trained_projection
from kvstore_client.projections.pairs import add_adapters, read_pairs
from kvstore_client.projections.search import Divergence, Found, SearchSettings, search
from kvstore_client.projections.show import show
from kvstore_client.projections.student import Sample
from kvstore_client.projections.texts import sequences
from kvstore_client.projections.training import Training, TrainingSettings
from kvstore_codecs.artifact import Projection, read_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["cpt", "sft"]


@dataclass(frozen=True)
class Run:
    """What a training or search is over and how it is shown and kept."""

    model: str
    text: Path
    length: int
    count: int
    skip: int
    device: str


def train(
    run: Run, projection: Path, out: Path, mode: Mode, settings: TrainingSettings, state: Path | None, every: int
) -> None:
    """Writes a projection whose bases and means were trained from another's; ValueError says what does not fit.

    `cpt` learns from all tokens of a text. `sft` learns from the responses of pairs, together with adapters that are
    written to the folder `OUT.adapters`; the projection then names no model, as there is none before they are merged.
    """
    check_budgets(settings.codec, settings.budgets)
    console = Console(stderr=True)
    start, network, samples = _prepared(run, projection, mode, console)
    adapted, adapters = None, []
    if mode == "sft":
        if settings.kl_share:
            raise ValueError("kl_share must be 0 with sft: its teacher would not have learned the responses")
        adapted, adapters = add_adapters(network, settings.seed)
    training = Training(network, start, settings, adapters)
    texts = [sample.ids for sample in samples]
    data_sha256 = digest_of_texts(texts)
    if state is not None and state.exists():
        checkpoint.restore(training, state, data_sha256)
    _show_steps(training, samples, state, data_sha256, every, console)
    tenth = max(1, training.done // 10)
    first, last = (fmean(losses) for losses in (training.losses[:tenth], training.losses[-tenth:]))
    measured = {"steps": float(training.done), "loss_first_tenth": first, "loss_last_tenth": last}
    if adapted is not None:
        adapted.save_pretrained(f"{out}.adapters")
        start = Projection(start.sha256, start.header.model_copy(update={"model_fingerprint": ""}), start.parts)
    method = f"train {mode} {settings.codec}"
    out.write_bytes(trained_projection(start, training.bases, texts, method, settings.seed, measured))
    show(out)


def find(run: Run, projection: Path, out: Path, settings: SearchSettings, state: Path | None) -> None:
    """Writes a projection with what each head keeps under each budget; ValueError says what does not fit."""
    check_budgets(settings.codec, settings.budgets)
    console = Console(stderr=True)
    start, network, samples = _prepared(run, projection, "cpt", console)
    made_from = {
        **json.loads(json.dumps(asdict(settings))),
        "projection": start.sha256,
        "data": digest_of_texts([sample.ids for sample in samples]),
    }
    found = [] if state is None or not state.exists() else _read_state(state, made_from)
    cost = Divergence(network, start, settings.codec, samples)
    columns = (TextColumn("{task.completed} allotments measured"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("searching", total=None)

        def counted(amounts: Tensor) -> float:
            progress.advance(task)
            return cost(amounts)

        for each in search(start, settings, counted, found):
            found = [*(known for known in found if known.budget != each.budget), each]
            console.print(f"{each.budget:g}: KL {each.kl:.5f}, {each.kl_start:.5f} at first, {each.sweeps} sweeps")
            if state is not None:
                _write_state(state, made_from, found)
    measured = {f"kl {settings.codec} {each.budget:g}": each.kl for each in found}
    amounts = {each.budget: each.amounts for each in sorted(found, key=lambda each: each.budget)}
    out.write_bytes(searched_projection(start, settings.codec, amounts, f"search {settings.start}", measured))
    show(out)


def _prepared(
    run: Run, projection: Path, mode: Mode, console: Console
) -> "tuple[Projection, PreTrainedModel, list[Sample]]":
    """What a run begins with; the model is frozen and on its device."""
    if run.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {run.device} is not here: this torch finds no CUDA device")
    start = read_projection(projection.read_bytes())
    network, tokenizer = commands.loaded(run.model, run.device, console)
    _check_made_for(start, network)
    if mode == "sft":
        samples = read_pairs(run.text, tokenizer, run.length)
    else:
        if run.length < start.header.max_position:
            raise ValueError(f"texts of {run.length} tokens are shorter than max_position {start.header.max_position}")
        samples = [Sample.whole(ids) for ids in sequences(run.text, tokenizer, run.length, run.count, run.skip)]
    network.requires_grad_(False)
    return start, network, samples


def _check_made_for(start: Projection, network: "PreTrainedModel") -> None:
    from kvstore_client.integrations.model_shape import shape_of
    from kvstore_codecs.spec import CodecSpec, Matryoshka

    codec = Matryoshka(basis=f"projection:{start.sha256}")
    start.check_serves(CodecSpec(keys=codec, values=codec, mean="none"), shape_of(network))


def _show_steps(
    training: Training, samples: Sequence[Sample], state: Path | None, data: str, every: int, console: Console
) -> None:
    """Runs the training; a line and a checkpoint after every so many steps and the last."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    steps = training.settings.steps
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps, completed=training.done, loss="")
        for step in training.run(samples):
            progress.update(task, completed=step.number, loss=f"loss {step.loss:.4f}, KL {step.kl:.4f}")
            if step.number % every == 0 or step.number == steps:
                recent = fmean(training.losses[-every:])
                console.print(f"step {step.number} of {steps}: loss {recent:.4f}, KL {step.kl:.4f}", highlight=False)
                if state is not None:
                    checkpoint.save(training, state, data)


def _write_state(file: Path, made_from: dict[str, object], found: Sequence[Found]) -> None:
    states = [{**asdict(each), "amounts": each.amounts.tolist()} for each in found]
    draft = file.with_name(f"{file.name}.draft")
    draft.write_text(json.dumps({"made_from": made_from, "found": states}))
    draft.rename(file)


def _read_state(file: Path, made_from: dict[str, object]) -> list[Found]:
    """ValueError, naming what differs, if the file is of another search."""
    try:
        saved = json.loads(file.read_text())
        theirs, states = saved["made_from"], saved["found"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file.name} is no state of a search") from None
    for name, ours in made_from.items():
        if theirs.get(name) != ours:
            raise ValueError(f"{file.name} is of a search with {name} {theirs.get(name)}, this one has {ours}")
    return [Found(**{**each, "amounts": torch.tensor(each["amounts"], dtype=torch.int32)}) for each in states]
