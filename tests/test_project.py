"""What keeps the repository in shape: generated code, imports, sizes and names."""

import filecmp
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_server.config import Section, Settings
from kvstore_server.limits import Limits

from .project_rules import (
    FUNCTION_LINES_MAX,
    MODULE_LINES_MAX,
    ROOT,
    VAGUE_NAMES,
    import_complaints,
    own_modules,
    size_complaints,
)


def test_generated_code_is_what_the_protocol_generates(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", tmp_path], check=True)
    committed = ROOT / "proto" / "kvstore_proto" / "v1"
    fresh = tmp_path / "kvstore_proto" / "v1"
    names = sorted(path.name for path in committed.glob("*_pb2*"))
    assert names == sorted(path.name for path in fresh.iterdir())
    same, different, missing = filecmp.cmpfiles(committed, fresh, names, shallow=False)
    assert (different, missing) == ([], []), "run `make proto`"
    assert len(same) == 4


def test_source_roots_are_not_packages() -> None:
    assert [root for root in ("kernels", "proto", "tests", "deploy") if (ROOT / root / "__init__.py").exists()] == []


def test_imports_lead_downwards_and_libraries_stay_behind_their_seams() -> None:
    assert import_complaints(own_modules()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kvstore_server.sessions.service", "from kvstore_server.rpc import convert"),
        ("kvstore_server.storage.log", "import kvstore_server.sessions.live"),
        ("kvstore_server.storage.log", "from kvstore_server import metadata"),
        ("kvstore_server.memory.pages", "def f():\n    from kvstore_server.scheduling.engine import Engine"),
        ("kvstore_server.rpc.service", "from kvstore_server import app"),
        ("kvstore_server.identity.key_ring", "from kvstore_server.sessions.registry import Registry"),
        ("kvstore_codecs.spec", "from kvstore_server.limits import Limits"),
        ("kvstore_client.client", "from kvstore_server.errors import NotFound"),
        ("kvstore_kernels.topk", "from kvstore_codecs.spec import CodecSpec"),
        ("kvstore_server.sessions.service", "import grpc"),
        ("kvstore_server.sessions.service", "from google.protobuf import message"),
        ("kvstore_server.sessions.service", "from kvstore_proto.v1 import kvstore_pb2"),
        ("kvstore_client.client", "import grpc.aio"),
        ("kvstore_server.metadata.memory", "import redis.asyncio"),
        ("kvstore_codecs.basis", "import cupy as cp"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    assert import_complaints({module: line})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kvstore_server.rpc.service", "import grpc\nfrom kvstore_proto.v1 import kvstore_pb2"),
        ("kvstore_server.rpc.service", "from kvstore_server.sessions import service"),
        ("kvstore_server.sessions.service", "from kvstore_server.metadata.index import Index"),
        ("kvstore_server.storage.log", "from kvstore_server.storage.store import ObjectStore"),
        ("kvstore_server.storage.log", "from kvstore_server.errors import DataLoss"),
        ("kvstore_client.session", "from kvstore_codecs.spec import CodecSpec"),
        ("kvstore_server.metadata.redis", "from redis.asyncio import Redis"),
    ],
)
def test_an_allowed_import_passes(module: str, line: str) -> None:
    assert import_complaints({module: line}) == []


def test_modules_and_functions_stay_small() -> None:
    tests = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    complaints = [line for name, source in (own_modules() | tests).items() for line in size_complaints(name, source)]
    assert complaints == []


def test_a_module_or_function_that_is_too_long_is_found() -> None:
    function = "def f():\n" + "    pass\n" * FUNCTION_LINES_MAX
    assert size_complaints("long", function) == [f"long: f has {FUNCTION_LINES_MAX + 1} lines"]
    assert size_complaints("long", "\n" * (MODULE_LINES_MAX + 1)) == [f"long has {MODULE_LINES_MAX + 1} lines"]
    assert size_complaints("short", function.replace("    pass\n", "", 1)) == []


def test_no_module_is_a_drawer_of_everything() -> None:
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    names = {part for module in own_modules() for part in module.split(".")}
    assert (names | tests) & VAGUE_NAMES == set()


def test_every_limit_and_setting_is_read_somewhere() -> None:
    definitions = {"kvstore_server.limits", "kvstore_server.config", "kvstore_server.access"}
    readers = "\n".join(source for name, source in own_modules().items() if name not in definitions)
    sections = [field.annotation for field in Settings.model_fields.values()]
    models = [Limits, *(m for m in sections if isinstance(m, type) and issubclass(m, Section))]
    names = {name for model in models for name in model.model_fields} | (set(Settings.model_fields) - {"limits"})
    in_config = {"password", "password_file", "insecure", "quota", "tenants"}  # read by the settings themselves
    assert {name for name in names if not re.search(rf"\.{name}\b", readers)} - in_config == set()
