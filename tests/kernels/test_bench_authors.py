"""What the benchmark says where the QJL authors' kernels cannot be built."""

from pathlib import Path

import pytest

from kvstore_kernels.bench_authors import SOURCES, Authors, NotBuiltError


def test_a_checkout_without_the_kernels_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotBuiltError, match=r"the checkout has no qjl_kernel/csrc/qjl_gqa_score_kernel\.cu"):
        Authors(tmp_path)


def test_a_machine_without_a_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "qjl_kernel" / "csrc"
    sources.mkdir(parents=True)
    for name in SOURCES.values():
        (sources / f"{name}.cu").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotBuiltError, match="no nvcc on PATH"):
        Authors(tmp_path)
