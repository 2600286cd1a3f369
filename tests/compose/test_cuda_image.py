"""The image for GPUs where there is none: it is built, compiles its kernels, and serves by the CPU or says why not."""

import asyncio
import re
import subprocess
import time
from collections.abc import Callable

import pytest

from ..project_rules import ROOT
from .daemon import ENVIRONMENT, docker
from .images import BASE, layers
from .stack import until
from .test_variants import round_trip
from .tools import FOLDER

pytestmark = [pytest.mark.root, pytest.mark.slow]
Tell = Callable[[str, object], None]
IMAGE, PLAIN = "remote-kv-store:cuda", "kvstore-test/plain"
BUILD_SECONDS, RUN_SECONDS, SERVING_SECONDS = 1_800.0, 300.0, 300.0
ADDRESS = "127.0.0.1:7700"
LOCKED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp")
VERSIONS = """
import os, cupy, torch
from cupy.cuda import nvrtc
compiler = ".".join(map(str, nvrtc.getVersion()))
print(f"torch {torch.__version__} for CUDA {torch.version.cuda}", end=", ")
print(f"CuPy {cupy.__version__}, NVRTC {compiler}, user {os.getuid()}")
"""
COMPILE = """
import torch
from cupy.cuda import nvrtc
from kvstore_kernels import build
from kvstore_kernels.cuda import dense, expand, pack_page, topk
variants = [*topk.variants(), *expand.variants(128), *dense.variants(128, torch.float16), *pack_page.variants()]
for name, macros, _ in variants:
    for architecture in ("sm_80", "sm_90"):
        program = nvrtc.createProgram(build.source(name), f"{name}.cu", [], [])
        nvrtc.compileProgram(program, [*build.options(macros), "-ftz=true", f"-arch={architecture}"])
        assert nvrtc.getCUBIN(program)
        nvrtc.destroyProgram(program)
print(len(variants), "kernels for sm_80 and sm_90")
"""


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> str:
    """Built over a base that knows of no build of torch but the index's own, which is the one with CUDA."""
    if not request.config.getoption("--cuda-image", default=False):
        pytest.skip("fetches and unpacks several GB: make test-compose ARGS=--cuda-image")
    tell: Tell = request.getfixturevalue("tell")
    request.getfixturevalue("private_docker")
    begun = time.monotonic()
    context = FOLDER / "plain"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(f"FROM {BASE}\nENV UV_FIND_LINKS=\n")
    docker("build", "--quiet", "--tag", PLAIN, context)
    options = ("--quiet", "--network=host", f"--build-arg=BASE={PLAIN}", "--target=cuda", "--tag", IMAGE)
    docker("build", *options, "--file", ROOT / "deploy" / "Dockerfile", ROOT, timeout=BUILD_SECONDS)
    tell(f"{IMAGE} built", f"{time.monotonic() - begun:.0f} s")
    tell(f"image {IMAGE}", layers(IMAGE)[1])
    return IMAGE


def ran(image: str, entrypoint: str, *arguments: str) -> tuple[int, str]:
    """Its exit code and what it printed, with no more rights than the stack gives it."""
    command = ("docker", "run", "--rm", "--network=none", *LOCKED, "--entrypoint", entrypoint, image, *arguments)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def test_torch_and_cupy_are_of_one_cuda_and_compile_what_it_needs(image: str, tell: Tell) -> None:
    code, versions = ran(image, "python", "-c", VERSIONS)
    assert code == 0, versions
    tell("in it", versions)
    assert re.search(r"for CUDA 13\.\d+, CuPy .*, NVRTC 13\.\d+, user 10001$", versions)
    code, compiled = ran(image, "python", "-c", COMPILE)
    assert code == 0, compiled
    tell("compiled in it", compiled)


def test_where_there_is_no_gpu_it_says_so_and_ends(image: str, tell: Tell) -> None:
    code, printed = ran(image, "kvstore", "serve", "--device", "cuda:0")
    assert (code, len(printed.splitlines())) == (1, 1), printed
    assert "cuda:0 cannot be used: torch sees no CUDA device" in printed
    tell("serve --device cuda:0", f"exit code {code}: {printed}")


@pytest.mark.parametrize("device", ["cpu", "auto"])
async def test_it_serves_by_the_cpu(image: str, tell: Tell, device: str) -> None:
    options = ("--detach", "--network=container:kvstore-loopback", *LOCKED, image)
    container = docker("run", *options, "serve", "--device", device).strip()
    try:
        begun = time.monotonic()
        await asyncio.to_thread(until, lambda: healthy(container), SERVING_SECONDS, "it was not healthy")
        assert await round_trip(ADDRESS) == "local"
        tell(f"serve --device {device}", f"SERVING after {time.monotonic() - begun:.0f} s, written and read")
    finally:
        print(docker("logs", container))
        docker("rm", "--force", "--volumes", container)


def healthy(container: str) -> bool:
    return docker("inspect", "--format={{.State.Health.Status}}", container).strip() == "healthy"
