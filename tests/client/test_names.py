import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import kvstore_client

BASE_INSTALL = {"google", "grpc", "numpy", "pydantic", "torch", "xxhash"}

PUBLIC = """
    Aborted AlreadyExists AppendBuffer AsyncKVStoreClient Attention Cancelled ChannelOptions CodecSpec DataLoss
    DeadlineExceeded FailedPrecondition Fidelity GrpcTransport Internal InvalidArgument KVStoreClient KVStoreError
    LayerOverride ModelShape NO_RETRY NotFound OutOfRange PermissionDenied Precision Prefix PrefixMatch ProjectionInfo
    ResourceExhausted Retry Scores ServerInfo Session SessionInfo Sketches SyncPrefix SyncSession Tls TokenChain
    TopK Transport Unauthenticated Unavailable Unimplemented Unknown from_flashinfer merge to_flashinfer to_sglang
    to_vllm
"""


def test_the_public_names_are_these():
    assert set(kvstore_client.__all__) == set(PUBLIC.split())
    assert all(hasattr(kvstore_client, name) for name in kvstore_client.__all__)


def source(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def imported(path: Path) -> set[str]:
    """Modules that importing the file imports; imports inside functions and for type checkers do not count."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found.add(node.module)
            if node.module.startswith("kvstore_"):
                found |= {name for alias in node.names if find_submodule(name := f"{node.module}.{alias.name}")}
    return found


def find_submodule(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_importing_the_client_needs_nothing_beyond_the_base_install():
    seen: set[str] = set()
    waiting = ["kvstore_client"]
    outside: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in imported(source(module)):
            if name.startswith("kvstore_"):
                waiting.append(name)
            else:
                outside.add(name.partition(".")[0])
    assert outside - set(sys.stdlib_module_names) <= BASE_INSTALL
    assert not any(module.startswith("kvstore_server") for module in seen)


def test_only_the_transport_imports_grpc():
    folder = Path(kvstore_client.__file__).parent
    importers = [path.name for path in folder.glob("*.py") if {"grpc", "grpc.aio"} & imported(path)]
    assert importers == ["transport.py"]
