"""The rules that this repository keeps about itself, as functions from source text to complaints."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = {"kvstore_server": "", "kvstore_client": "", "kvstore_codecs": "kernels", "kvstore_kernels": "kernels"}
MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}

LAYERS = [
    ("kvstore_server.cli",),
    ("kvstore_server.commands",),
    ("kvstore_server.app",),
    ("kvstore_server.rpc",),
    ("kvstore_server.sessions", "kvstore_server.identity"),
    ("kvstore_server.scheduling", "kvstore_server.memory", "kvstore_server.storage", "kvstore_server.metadata"),
    ("kvstore_codecs",),
    ("kvstore_kernels",),
]
"""An import leads to a lower layer or stays in its package; what is not named here (errors, limits) serves all."""

HOMES = {
    "grpc": ("kvstore_server.rpc", "kvstore_server.app", "kvstore_client.transport", "kvstore_client.bench"),
    "grpc_health": ("kvstore_server.rpc", "kvstore_server.app"),
    "grpc_reflection": ("kvstore_server.app",),
    "google": ("kvstore_server.rpc", "kvstore_client"),
    "kvstore_proto": ("kvstore_server.rpc", "kvstore_client"),
    "kvstore_server": ("kvstore_server",),
    "kvstore_client": (
        "kvstore_client",
        "kvstore_server.cli",
        "kvstore_server.commands",
        "kvstore_server.report",
    ),
    "redis": ("kvstore_server.metadata.redis", "kvstore_server.metadata.redis_client"),
    "obstore": ("kvstore_server.storage.bucket",),
    "cupy": ("kvstore_kernels",),
}
"""Who may import what."""


def own_modules() -> dict[str, str]:
    """Dotted name to source of every module that is not generated."""
    modules: dict[str, str] = {}
    for package, folder in SOURCE_ROOTS.items():
        root = ROOT / folder
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return modules


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported(source: str) -> Iterator[str]:
    """Every name that the source imports, wherever in it; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or not node.module:
                raise ValueError("relative import")
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layer_and_package(module: str) -> tuple[int, str] | None:
    places = ((i, package) for i, layer in enumerate(LAYERS) for package in layer if is_in(module, package))
    return next(places, None)


def import_complaints(modules: Mapping[str, str]) -> list[str]:
    """One line for each import that leads up or sideways, or to what belongs elsewhere."""
    complaints: list[str] = []
    for module, source in modules.items():
        here = _layer_and_package(module)
        for target in sorted(set(imported(source))):
            there = _layer_and_package(target)
            if here and there and here[1] != there[1] and here[0] >= there[0]:
                complaints.append(f"{module} imports {target}")
            homes = HOMES.get(target.partition(".")[0])
            if homes and not any(is_in(module, home) for home in homes):
                complaints.append(f"{module} imports {target}: only for {', '.join(homes)}")
    return complaints


def size_complaints(name: str, source: str) -> list[str]:
    """One line for a module and for each function that should be split."""
    lines = source.count("\n")
    complaints = [f"{name} has {lines} lines"] if lines > MODULE_LINES_MAX else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                complaints.append(f"{name}: {node.name} has {length} lines")
    return complaints
