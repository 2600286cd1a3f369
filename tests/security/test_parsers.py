"""Every parser of stored or sent bytes: whatever they are, only its own errors, little memory, little time."""

import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvstore_codecs.artifact import ProjectionHeader, write_projection
from kvstore_codecs.spec import KINDS, ModelShape
from kvstore_server.storage.segment import write_segment

from ..faults.tally import only_in_the_whole_suite, times
from ..project_rules import ROOT
from ..storage.inputs import SPEC, commit_log, next_segment, object_bytes
from ..storage.memory_store import MemoryStore
from .fuzzing import parsers
from .fuzzing.mutations import changed_bytes
from .fuzzing.parsers import PARSERS, TIMES_INPUT_MAX, Parser, Violation, examine
from .fuzzing.seeds import seeds_of

SECONDS = 60
INPUTS = times(400, 2_000)
each_parser = pytest.mark.parametrize("name", PARSERS)
with_atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not there: make test-security")


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def examine_all(name: str, count: int) -> None:
    """What was written, and that with some bytes changed."""
    seeds, chance = seeds_of(name), random.Random(1)
    for data in seeds:
        examine(PARSERS[name], data)
    for _ in range(count):
        examine(PARSERS[name], changed_bytes(chance.choice(seeds), chance))


@each_parser
def test_what_was_written_is_read(name: str) -> None:
    parser = PARSERS[name]
    if name == "commit log":  # of an append whose record is not the fork's that the seed is
        return
    for seed in seeds_of(name):
        parser.parse(parser.seal(seed))


@each_parser
def test_changed_bytes_raise_nothing_but_the_parser_s_own_error(name: str) -> None:
    examine_all(name, INPUTS)


@each_parser
def test_a_check_that_is_taken_out_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PARSERS[name].planted)
    with pytest.raises(Exception) as found:  # noqa: PT011 - which one depends on the check
        examine_all(name, 5_000)
    assert not isinstance(found.value, PARSERS[name].errors)


def test_too_much_memory_and_time_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = Parser(lambda data: bytearray(1 << 20), (), (None, "", None))
    with pytest.raises(Violation, match="allocated"):
        examine(greedy, b"1")
    monkeypatch.setattr(parsers, "SECONDS_MAX", -1.0)
    with pytest.raises(Violation, match="took"):
        examine(Parser(len, (), (None, "", None)), b"1")


def fuzzed(name: str, folder: Path, seconds: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    for number, seed in enumerate(seeds_of(name)):
        (folder / f"seed-{number}").write_bytes(seed)
    command = [sys.executable, "-m", "tests.security.fuzzing.guided", name, str(folder), str(seconds), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 60, check=False)


@only_in_the_whole_suite
@with_atheris
@each_parser
def test_a_minute_of_guided_fuzzing_finds_nothing(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    done = fuzzed(name, tmp_path / "corpus", SECONDS)
    found = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    cases = int(found[1]) if found else 0
    coverage = re.findall(r"cov: (\d+)", done.stderr)
    record_property("what", f"parser: {name}")
    record_property("cases", cases)
    print(f"{name}: {cases:,} inputs, {coverage[0]} to {coverage[-1]} places reached", flush=True)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    assert cases > 1_000


@only_in_the_whole_suite
@with_atheris
@each_parser
def test_guided_fuzzing_finds_a_check_that_is_taken_out(name: str, tmp_path: Path) -> None:
    done = fuzzed(name, tmp_path / "corpus", SECONDS, "--planted")
    assert done.returncode != 0
    assert "Uncaught Python exception" in done.stdout, done.stderr[-4_000:]


def large_object() -> bytes:
    """An append of 32 MiB."""
    log = commit_log(MemoryStore())
    shape = ModelShape(layers=2, kv_heads=8, query_heads=8, head_dim=128, dtype="float16", sm_scale=0.1)
    state, _ = log.create("a", shape, SPEC)
    return object_bytes(write_segment(next_segment(log, state, 4_000, exact=4_000)))


def large_projection() -> bytes:
    """Of 32 MiB and a little."""
    layers, heads, d = 32, 8, 128
    facts = {"model_fingerprint": "", "metric": "none", "max_position": 1, "calibration_tokens": 1}
    header = ProjectionHeader(layers=layers, kv_heads=heads, head_dim=d, calibration_length=1, **facts)
    parts = {}
    for kind in KINDS:
        parts[f"{kind}.basis"] = torch.eye(d).expand(layers, heads, d, d).contiguous()
        parts[f"{kind}.weights"] = torch.ones(layers, heads, d)
        parts[f"{kind}.mean"] = torch.zeros(layers, heads, d)
    return write_projection(header, parts)


@only_in_the_whole_suite
@pytest.mark.parametrize(("name", "make"), [("object", large_object), ("projection", large_projection)])
def test_a_large_file_takes_at_most_four_times_its_size(name: str, make: Callable[[], bytes], tmp_path: Path) -> None:
    data = make()
    (tmp_path / "file").write_bytes(data)
    command = [sys.executable, "-m", "tests.security.fuzzing.large", name, str(tmp_path / "file")]
    gained = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout)
    print(f"{name} of {len(data) / 2**20:.0f} MiB: {gained / len(data):.2f} times its size")
    assert len(data) / 2 < gained < TIMES_INPUT_MAX * len(data)


@only_in_the_whole_suite
@pytest.mark.parametrize(
    ("name", "input_bytes", "mebibytes_max"),
    [("object, sealed", 4 << 20, 160), ("record", 1 << 20, 40), ("projection", 1 << 20, 40), ("codec", 64 << 10, 8)],
)
def test_json_made_to_be_large_is_bounded_by_the_limit_of_its_text(
    name: str, input_bytes: int, mebibytes_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's objects take many times their text; so the text is bounded, before it is parsed."""
    monkeypatch.setattr(parsers, "SECONDS_MAX", 60.0)
    monkeypatch.setattr(parsers, "TIMES_INPUT_MAX", 0)
    monkeypatch.setattr(parsers, "FIXED_BYTES", mebibytes_max << 20)
    data = b'{"__metadata__":{},"x":[' + b'{"":[]},' * (input_bytes // 8 - 20) + b"0]}"
    if name in ("object, sealed", "projection"):
        data = struct.pack("<Q", len(data)) + data
    examine(PARSERS[name], data)
    monkeypatch.setattr(parsers, "FIXED_BYTES", 0)
    with pytest.raises(Violation) as found:
        examine(PARSERS[name], data)
    print(f"{name}: {found.value}")
