"""Generates the committed protobuf code: `python proto/generate.py [OUT]`; OUT is `proto` unless named."""

import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
PROTO = "kvstore_proto/v1/kvstore.proto"


def generate(out: Path) -> None:
    """Writes the modules and their typed stubs below `out`; raises RuntimeError if protoc fails."""
    includes = [str(ROOT), sysconfig.get_path("purelib"), str(files("grpc_tools") / "_proto")]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = [f"--plugin={p.name}={p}" for p in Path(sys.executable).parent.glob("protoc-gen-mypy*")]
    if protoc.main(["protoc", *(f"-I{i}" for i in includes), *plugins, *outputs, PROTO]):
        raise RuntimeError(f"protoc failed on {PROTO}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
