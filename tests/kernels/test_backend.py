import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

from kvstore_kernels import cpu_backend, open_backend
from kvstore_kernels.backend import ReferenceBackend
from kvstore_kernels.compiled import jit
from kvstore_kernels.compiled.jit import kernel
from kvstore_kernels.compiled.threads import run


def test_the_cpu_is_opened_by_name() -> None:
    assert open_backend("cpu").name == "cpu"


@pytest.mark.parametrize("name", ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "cpu:0"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not auto, cpu or cuda:N"):
        open_backend(name)


def test_without_cuda_auto_is_the_cpu_and_cuda_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvstore_kernels.cuda_backend", None)
    assert open_backend("auto").name == "cpu"
    with pytest.raises(RuntimeError, match="cuda:0 cannot be used"):
        open_backend("cuda:0")


def test_without_numba_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    assert type(cpu_backend()) is ReferenceBackend


def test_a_kernel_compiles_where_its_machine_code_cannot_be_kept() -> None:
    namespace: dict[str, object] = {}
    exec("def double(x):\n    return 2 * x", namespace)  # a function without a file has no place for a cache
    double = namespace["double"]
    assert callable(double)
    assert kernel(double)(21) == 42


def test_tasks_run_once_each_and_the_first_failure_is_raised() -> None:
    torch.set_num_threads(3)
    try:
        done: list[int] = []
        run(done.append, 50)
        assert sorted(done) == list(range(50))
        with pytest.raises(ValueError, match="not in list"):
            run(list(range(30)).remove, 50)
    finally:
        torch.set_num_threads(1)


def test_kept_machine_code_is_not_used_once_a_kernel_that_it_calls_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(jit.__file__, tmp_path / "own_jit.py")
    (tmp_path / "own_outer.py").write_text(
        "from own_inner import inner\nfrom own_jit import kernel\n\n@kernel\ndef outer(x):\n    return inner(x) + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for factor in (2, 3):
        (tmp_path / "own_inner.py").write_text(
            f"from own_jit import kernel\n\n@kernel\ndef inner(x):\n    return {factor} * x\n"
        )
        for name in ("own_jit", "own_inner", "own_outer"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        assert importlib.import_module("own_outer").outer(10) == 10 * factor + 1
