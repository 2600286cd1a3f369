"""`kvstore projections train` and `search` on a tiny model: files, going on after a stop, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.projections import commands
from kvstore_client.projections.pairs import add_adapters, read_pairs
from kvstore_codecs.artifact import read_projection
from kvstore_server.cli import app

from .test_training import LENGTH, start
from .tiny import tiny_llama, token_ids


class Letters:
    """A tokenizer: every letter is a token of the tiny model."""

    eos_token_id = 96

    def __call__(self, text: str, return_tensors: str = "", **_: object) -> dict[str, Any]:
        ids = [1 + ord(letter) % 95 for letter in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a projection, a text and pairs."""
    monkeypatch.setattr(commands, "loaded", lambda model, device, console: (tiny_llama(), Letters()))
    from kvstore_codecs.artifact import write_projection

    (tmp_path / "start").write_bytes(write_projection(start().header, start().parts))
    (tmp_path / "text").write_text("".join(chr(33 + int(n)) for n in token_ids(2000)[0]))
    pair = {"prompt": "what is the capital of the land of letters? " * 2, "response": "it is A, of course"}
    (tmp_path / "pairs").write_text(f"{json.dumps(pair)}\n" * 3)
    return tmp_path


def run(folder: Path, command: str, *args: str, text: str = "text", out: str = "out") -> Any:
    given = ("--text", str(folder / text), "--projection", str(folder / "start"), "--out", str(folder / out))
    options = ("--length", str(LENGTH), "--count", "2")
    return CliRunner().invoke(app, ["projections", command, *given, *options, *args], env={"COLUMNS": "250"})


def train(folder: Path, *args: str, **where: str) -> Any:
    return run(folder, "train", "--codec", "projected", *args, **where)


def test_training_writes_a_projection_and_an_interrupted_one_the_same(folder: Path) -> None:
    state = ("--state", str(folder / "state"))
    once = train(folder, "--steps", "4", out="once")
    assert once.exit_code == 0, once.output
    assert "step 4 of 4: loss " in once.output
    header = read_projection((folder / "once").read_bytes()).header
    assert header.method.startswith(f"train cpt projected from {start().sha256[:12]}")
    assert header.measured["steps"] == 4
    assert header.model_fingerprint == shape_of(tiny_llama()).model_fingerprint
    for _ in range(2):  # the second finds the first one's end
        again = train(folder, "--steps", "4", "--every", "3", *state, out="again")
        assert again.exit_code == 0, again.output
    assert (folder / "again").read_bytes() == (folder / "once").read_bytes()
    other = train(folder, "--steps", "5", *state)
    assert other.exit_code == 2
    assert "state is of a training with steps 4, this one has 5" in other.output


def test_supervised_training_writes_adapters_beside_a_projection_that_names_no_model(folder: Path) -> None:
    for out in ("out", "again"):  # the second finds the first one's end
        made = train(folder, "--mode", "sft", "--steps", "2", "--state", str(folder / "state"), text="pairs", out=out)
        assert made.exit_code == 0, made.output
    learned = [(folder / f"{out}.adapters" / "adapter_model.safetensors").read_bytes() for out in ("out", "again")]
    assert learned[0] == learned[1]
    assert read_projection((folder / "out").read_bytes()).header.model_fingerprint == ""
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (folder / "out.adapters").iterdir()}


def test_adapters_learn_and_the_model_stays_as_it_was() -> None:
    model = tiny_llama().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, parameters = add_adapters(model, 0)
    assert parameters
    assert all(parameter.requires_grad for parameter in parameters)
    kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora" not in name}
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)


def test_only_tokens_of_the_response_count(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "pairs", Letters()
    file.write_text('{"prompt": "abc", "response": "de"}\n')
    sample = read_pairs(file, tokenizer, 64)[0]  # type: ignore[arg-type]
    assert sample.ids.tolist() == [[*tokenizer("abcde")["input_ids"], 96]]
    assert sample.learned.tolist() == [False, False, True, True, True]
    assert read_pairs(file, tokenizer, 4)[0].learned.tolist() == [False, False, True]  # type: ignore[arg-type]
    for text, reason in (
        ('{"prompt": "abc"}\n', "line 1 is not"),
        ('{"prompt": "abc", "response": "d"}\nx\n', "line 2 is not"),
        ('{"prompt": "", "response": "d"}\n', "line 1 has a prompt of 0 of at most 64 tokens"),
        ("", "pairs has no pairs"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_pairs(file, tokenizer, 64)  # type: ignore[arg-type]


def test_a_search_writes_allotments_and_goes_on_where_it_was(folder: Path) -> None:
    args = ("--codec", "projected", "--budget", "0.25", "--budget", "0.5", "--step", "8", "--sweeps", "1")
    once = run(folder, "search", *args, out="once")
    assert once.exit_code == 0, once.output
    found = read_projection((folder / "once").read_bytes())
    assert found.header.shares == (0.25, 0.5)
    assert found.header.method.startswith("search water-filling from ")
    assert {name: int(found.parts[name].sum()) for name in ("ranks.0.25", "ranks.0.5")} == {
        "ranks.0.25": 64,
        "ranks.0.5": 128,
    }
    state = ("--state", str(folder / "state"))
    assert run(folder, "search", *args, *state).exit_code == 0
    saved = json.loads((folder / "state").read_text())
    saved["found"] = saved["found"][:1]
    (folder / "state").write_text(json.dumps(saved))
    again = run(folder, "search", *args, *state, out="again")
    assert again.exit_code == 0, again.output
    assert (folder / "again").read_bytes() == (folder / "once").read_bytes()
    other = run(folder, "search", *args, "--floor", "4", *state)
    assert other.exit_code == 2
    assert "state is of a search with floor 0, this one has 4" in other.output


@pytest.mark.parametrize(
    ("command", "args", "reason"),
    [
        ("train", ("--length", "64"), "texts of 64 tokens are shorter than max_position 96"),
        ("train", ("--count", "99"), "are needed"),
        ("train", ("--mode", "sft", "--kl-share", "0.5"), "line 1 is not"),
        ("train", ("--budget", "7"), "budget 7 is outside (0, 6]"),
        ("search", ("--budget", "0.5", "--device", "cuda"), "device cuda is not here"),
        ("search", (), "no budget is given"),
        ("search", ("--codec", "projected", "--budget", "1.5"), "budget 1.5 is outside (0, 1]"),
        ("search", ("--codec", "projected", "--budget", "0.25", "--floor", "9"), "floor 9 of 8 heads"),
    ],
)
def test_what_does_not_fit_is_said(folder: Path, command: str, args: tuple[str, ...], reason: str) -> None:
    refused = run(folder, command, *args)
    assert refused.exit_code == 2, refused.output
    assert reason in refused.output
    assert not (folder / "out").exists()


def test_supervised_training_has_no_teacher(folder: Path) -> None:
    refused = train(folder, "--mode", "sft", "--kl-share", "0.5", text="pairs")
    assert refused.exit_code == 2
    assert "kl_share must be 0 with sft" in refused.output


def test_a_projection_of_another_model_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        commands, "loaded", lambda model, device, console: (tiny_llama(initializer_range=0.1), Letters())
    )
    refused = train(folder, "--steps", "1")
    assert refused.exit_code == 2
    assert "has model_fingerprint" in refused.output
