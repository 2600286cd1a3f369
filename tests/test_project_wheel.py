"""What a user installs: exactly our five packages, with their data, and nothing called `kernels`."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator
from pathlib import Path

import pytest

from .project_rules import ROOT

PACKAGES = {"kvstore_proto", "kvstore_kernels", "kvstore_codecs", "kvstore_server", "kvstore_client"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")  # a copy, because a build leaves its traces
    for name in ("kernels", "proto", "kvstore_server", "kvstore_client"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[zipfile.ZipFile]:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def test_only_our_packages_are_at_the_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_every_source_data_and_marker_file_is_inside(source: Path, wheel: zipfile.ZipFile) -> None:
    wanted = {
        str(path.relative_to(source / root))
        for root in ("kernels", "proto", ".")
        for package in PACKAGES
        for suffix in ("*.py", "*.pyi", "*.proto", "*.cu", "*.cuh", "py.typed")
        for path in (source / root / package).rglob(suffix)
    }
    assert wanted <= set(wheel.namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= wanted


def test_the_licence_and_the_command_are_inside(wheel: zipfile.ZipFile) -> None:
    info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "kvstore = kvstore_server.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()
