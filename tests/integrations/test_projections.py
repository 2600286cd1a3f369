"""Fitting projections to a transformers model, and measuring what codecs cost it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.projections import commands
from kvstore_client.projections.attention import SINK_TOKENS, LayerCall, answering, causal_weights, stored_mask
from kvstore_client.projections.coarse_to_fine import coarse_to_fine
from kvstore_client.projections.fit import gather, projection_of
from kvstore_client.projections.gather import Gatherer
from kvstore_client.projections.needles import DEPTHS, needles, recall
from kvstore_client.projections.quality import CodedAttention, measure
from kvstore_client.projections.rows import DEFAULT, CodecRow
from kvstore_client.projections.texts import sequences
from kvstore_codecs.artifact import Metric, Projection, read_projection
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import RAW, Affine, Matryoshka, Qjl, Raw
from kvstore_kernels.backend import cpu_backend
from kvstore_server.cli import app

from .tiny import tiny_llama, token_ids

LENGTH = 160


def exact(call: LayerCall) -> Tensor:
    return torch.stack([causal_weights(call, head) @ call.v[head // call.group] for head in range(len(call.q))])


def fitted(model: Any, metric: Metric = "output") -> Projection:
    texts = [token_ids(LENGTH, seed) for seed in range(6)]
    return read_projection(projection_of(model, gather(model, texts, lambda done: None), texts, metric, LENGTH))


@torch.no_grad()
def test_an_answer_in_the_models_place_is_the_model() -> None:
    model, ids = tiny_llama(), token_ids(50)
    expected = model(ids).logits
    with answering(model, exact):
        found = model(ids, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(model(ids).logits, expected)
    with answering(model, Gatherer(shape_of(model))):
        assert torch.equal(model(ids, use_cache=False).logits, found)


@pytest.mark.parametrize("kind", ["keys", "values"])
@torch.no_grad()
def test_the_output_metric_is_how_far_errors_move_the_layers_output(kind: str) -> None:
    """Small independent errors of stored tokens, one query head a KV head: the mean square of what comes out."""
    model = tiny_llama(num_key_value_heads=4)
    calls: list[LayerCall] = []
    gatherer = Gatherer(shape_of(model))

    def answer(call: LayerCall) -> Tensor:
        calls.append(call)
        return gatherer(call)

    with answering(model, answer):
        model(token_ids(LENGTH), use_cache=False)
    call, generator = calls[1], torch.Generator().manual_seed(1)
    stored = stored_mask(LENGTH)
    before, moved = exact(call), torch.zeros(4, dtype=torch.float64)
    for _ in range(100):
        error = 1e-3 * torch.randn(call.k.shape, generator=generator)
        coded = replace(call, **{kind[0]: (call.k if kind == "keys" else call.v) + error})
        after = torch.stack([_mixed(call, coded, head, stored) for head in range(4)])
        out = torch.einsum("htd,ehd->hte", after - before, call.output)
        moved += (out.square().sum(2) / call.residual.square().sum(1)).sum(1).double()
    metric = gatherer.layers[1].metric("keys" if kind == "keys" else "values", "output")
    assert metric is not None
    expected = 1e-6 * metric.diagonal(dim1=1, dim2=2).sum(1) * LENGTH * 100
    assert ((moved / expected - 1).abs() <= 0.15).all()


def _mixed(call: LayerCall, coded: LayerCall, head: int, stored: Tensor) -> Tensor:
    logits = torch.where(stored, coded.q[head] @ coded.k[head].T, call.q[head] @ call.k[head].T) * call.sm_scale
    weights = torch.softmax(logits + torch.full_like(logits, -torch.inf).triu(1), -1)
    return (weights * stored) @ coded.v[head] + (weights * ~stored) @ call.v[head]


def test_a_fit_is_deterministic_and_names_what_it_was_made_from() -> None:
    model = tiny_llama()
    found = fitted(model)
    assert found == fitted(model)
    assert found.header.model_fingerprint == shape_of(model).model_fingerprint
    assert (found.header.max_position, found.header.calibration_tokens) == (LENGTH, 6 * LENGTH)
    assert found.header.has_metrics
    assert fitted(model, "query").metric("keys") is None


def test_a_fit_to_texts_that_are_too_short_is_refused() -> None:
    model, texts = tiny_llama(), [token_ids(LENGTH)]
    gatherer = gather(model, texts, lambda done: None)
    with pytest.raises(ValueError, match="texts of 160 tokens cannot calibrate max_position 4096"):
        projection_of(model, gatherer, texts, "output", 4096)


def test_a_weighted_basis_costs_less_than_a_plain_one_and_exactness_costs_nothing() -> None:
    model, texts = tiny_llama(), [token_ids(LENGTH, 50), token_ids(LENGTH, 51)]
    shape, backend = shape_of(model), cpu_backend()
    rows: dict[str, Any] = {"raw": lambda seen: CodedAttention(plan_for(RAW, shape, None), backend)}
    for metric in ("none", "output"):
        found = fitted(model, metric)
        known = {"one": found}
        rows[metric] = CodecRow.parse("both:matryoshka:1.5", shape, known, backend)
        rows[f"{metric} finer"] = CodecRow.parse("both:matryoshka:3", shape, known, backend)
        rows[f"{metric} coarse"] = CodecRow.parse("both:matryoshka:3@1", shape, known, backend)
    steps: list[int] = []
    quality = measure(model, texts, rows, from_token=20, done=steps.append)
    assert steps == list(range(1, 2 * len(rows) + 1))
    assert quality["raw"].kl <= 1e-6
    assert quality["raw"].top1 == 1
    assert quality["raw"].output_error <= 1e-5 < quality["output finer"].output_error < quality["output"].output_error
    assert abs(quality["raw"].perplexity_rise) <= 1e-4
    assert quality["output"].kl < quality["none"].kl
    for metric in ("none", "output"):
        assert quality[f"{metric} finer"].kl < quality[f"{metric} coarse"].kl < quality[metric].kl


def test_rows_are_read_by_name() -> None:
    model = tiny_llama()
    shape, backend, first = shape_of(model), cpu_backend(), fitted(model)
    known = {"first": first, "second": fitted(model, "none")}

    def row(text: str) -> CodecRow:
        return CodecRow.parse(text, shape, known, backend)

    assert [row(text).level for text in DEFAULT] == [int("@1" in text) for text in DEFAULT]
    found = row("keys:matryoshka:2")
    assert found.codecs == (Matryoshka(bits=2, basis=f"projection:{first.sha256}"), Raw())
    assert found.bits().code == 2
    assert 0 < found.bits().scales <= 0.5
    assert row("values:matryoshka:2:second").projections == (known["second"],)
    assert row("keys:matryoshka:2:own").codecs[0] == Matryoshka(bits=2, basis="session")
    assert row("keys:matryoshka:2:own+first").codecs[0] == Matryoshka(bits=2, basis=f"session:{first.sha256}")
    assert row("both:projected:0.5:own").bits().code == 8
    assert row("both:paper:2").codecs == (Qjl(bits=2 * shape.head_dim, scale="paper"), Affine(planes=2))
    with pytest.raises(ValueError, match="is no row"):
        row("keys:rotated")
    with pytest.raises(ValueError, match="needs a projection called third"):
        row("keys:matryoshka:2:third")
    with pytest.raises(ValueError, match="needs a projection"):
        CodecRow.parse("keys:matryoshka:2", shape, {}, backend)


def test_bits_of_a_session_count_its_exact_tokens_its_means_and_its_bases() -> None:
    model = tiny_llama()
    shape, backend = shape_of(model), cpu_backend()
    given = CodecRow.parse("keys:matryoshka:2", shape, {"one": fitted(model)}, backend)
    own = CodecRow.parse("keys:matryoshka:2:own", shape, {}, backend)
    numbers = shape.layers * shape.kv_heads * shape.head_dim
    codes, tokens = given.bits().total, 10_000
    assert given.bits_at(tokens) == pytest.approx((16 * 4 + codes * (tokens - 4)) / tokens)
    per_number = 32 + 16 * shape.head_dim + 32  # mean, basis column, weight
    exact = (16 * 516 + own.bits().total * (tokens - 516)) / tokens
    assert own.bits_at(tokens) == pytest.approx(exact + per_number * numbers / (tokens * numbers))


def test_planted_facts_are_asked_for_at_every_depth_and_exactness_loses_none() -> None:
    model, tokenizer = tiny_llama(), Words()
    shape = shape_of(model)
    asked = needles(token_ids(400), cast("Any", tokenizer), (200,), 2, seed=1)
    assert [needle.depth for needle in asked] == [depth for depth in DEPTHS for _ in range(2)]
    assert all(needle.ids.shape == (1, 200) for needle in asked)
    steps: list[int] = []
    exactly = {"raw": lambda seen: CodedAttention(plan_for(RAW, shape, None), cpu_backend())}
    found = recall(model, asked, exactly, steps.append)
    assert steps[-1] == 2 * len(asked)
    assert found["raw"] == found["exact"]
    assert list(found["raw"]) == [(200, depth) for depth in DEPTHS]
    taught = replace(asked[0], ids=_greedy(model, asked[0].ids, asked[0].answer))
    assert recall(model, [taught], {}, steps.append)["exact"] == {(200, asked[0].depth): 1.0}


@torch.no_grad()
def _greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    """The ids with the last `count` replaced by what the model would say."""
    ids = ids[:, :-count]
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_a_coarse_pass_over_everything_finds_everything_and_a_shorter_one_reads_less() -> None:
    model = tiny_llama()
    shape, backend, known = shape_of(model), cpu_backend(), {"one": fitted(model)}
    names = ("keys:matryoshka:4@1", "keys:matryoshka:4@3")
    rows = {name: CodecRow.parse(name, shape, known, backend) for name in names}
    found = coarse_to_fine(model, token_ids(600), rows)
    fine, coarse, wider = found[names[0], 2], found[names[1], 2], found[names[1], 4]
    assert coarse.recall < fine.recall <= 1
    assert coarse.recall < wider.recall
    assert coarse.bytes_read < wider.bytes_read
    assert coarse.bytes_read < fine.bytes_read


class Words:
    """One token for each three letters."""

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[1 + sum(map(ord, text[i : i + 3])) % 90 for i in range(0, len(text), 3)]])}


def test_texts_are_cut_from_one_file(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("abcdefghij")
    tokenizer: Any = Letters()
    assert [ids.tolist() for ids in sequences(file, tokenizer, 3, 2, skip=1)] == [[[3, 4, 5]], [[6, 7, 8]]]
    with pytest.raises(ValueError, match="text has 10 tokens, 12 are needed"):
        sequences(file, tokenizer, 3, 4)
    assert SINK_TOKENS == 4


class Letters:
    """A tokenizer: every letter is a token of the tiny model."""

    def __call__(self, text: str, **_: object) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[1 + ord(letter) % 96 for letter in text]])}


def test_the_commands_fit_show_and_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "loaded", lambda model, device, console: (tiny_llama(), Letters()))
    text, out, table = tmp_path / "text", tmp_path / "out.safetensors", tmp_path / "table.json"
    text.write_text("".join(chr(33 + int(n)) for n in token_ids(2000)[0]))

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})

    made = run("projections", "fit", "--text", str(text), "--out", str(out), "--length", "64", "--count", "3")
    assert made.exit_code == 0, made.output
    shown = run("projections", "show", str(out))
    assert shown.output == made.output
    assert f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}" in shown.output
    assert "max_position 64" in shown.output
    rows = ("--row", "keys:matryoshka:2", "--row", "both:projected:0.5")
    given = ("--text", str(text), "--projection", f"one={out}", "--count", "2", *rows, "--json", str(table))
    measured = run("bench", "quality", *given, "--length", "64", "--direct", "--plot", str(tmp_path / "chart.png"))
    assert measured.exit_code == 0, measured.output
    direct = {row["row"]: row for row in json.loads(table.read_text())["rows"]}
    assert list(direct) == ["keys:matryoshka:2", "both:projected:0.5"]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "projection one: " in measured.output
    more = ("--table", str(table), "--row", "values:rotated:2", "--length", "64", "--direct", *given[:6])
    merged = run("bench", "quality", *more, "--json", str(tmp_path / "merged.json"))
    assert merged.exit_code == 0, merged.output
    found = {row["row"]: row for row in json.loads((tmp_path / "merged.json").read_text())["rows"]}
    assert list(found) == [*direct, "values:rotated:2"]
    assert {name: found[name] for name in direct} == direct
    served = run("bench", "quality", *given, "--length", "192")
    assert served.exit_code == 0, served.output
    assert "client and server" in served.output
    behind = {row["row"]: row for row in json.loads(table.read_text())["rows"]}
    assert all(0 < row["kl"] < 3 for row in behind.values())
    for args, reason in (
        (("projections", "fit", "--text", str(text), "--out", str(out), "--count", "99"), "are needed"),
        (("projections", "fit", "--text", str(text), "--out", str(out), "--metric", "best"), "is not output"),
        (("projections", "show", str(text)), "a projection's header"),
        (("bench", "quality", "--text", str(text), "--row", "keys:best:1"), "is no row"),
        (("bench", "quality", *more, "--from-token", "1"), "a table is of a run with"),
        (("bench", "quality", "--text", str(text), "--table", str(text)), "is no table"),
        (("bench", "quality", "--text", str(text), "--device", "cuda:0"), "with --direct"),
    ):
        refused = run(*args)
        assert refused.exit_code == 2
        assert reason in refused.output
