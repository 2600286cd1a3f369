"""compute-sanitizer has nothing to say of any kernel."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.gpu import inputs
from tests.gpu.every_op import BUGS

inputs.require_device()
if shutil.which("compute-sanitizer") is None:
    pytest.skip("compute-sanitizer is not on PATH", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
every_tool = pytest.mark.parametrize("tool", list(BUGS))
FOUND = 9


def sanitize(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Every tensor gets memory of its own, so that one that is overrun has no neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), sys.executable]
    return subprocess.run(
        [*command, "-m", "tests.gpu.every_op", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )


@every_tool
def test_kernels_are_clean(tool: str) -> None:
    result = sanitize(tool)
    assert result.returncode == 0, result.stdout[-5000:]


@every_tool
def test_a_bug_is_found(tool: str) -> None:
    assert sanitize(tool, tool).returncode == FOUND
