"""A Docker daemon of the tests' own: socket, data and processes are its folder's, and other daemons are left alone."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .tools import FOLDER, TOOLS, run

HERE = FOLDER / "docker"
SOCKET = HERE / "docker.sock"
START_SECONDS, STOP_SECONDS = 60.0, 60.0
ENVIRONMENT = {
    "PATH": f"{TOOLS}/usr/bin:{TOOLS}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": str(HERE),
    "DOCKER_HOST": f"unix://{SOCKET}",
    "DOCKER_CONFIG": str(TOOLS / "config"),
    "DOCKER_BUILDKIT": "1",
    "COMPOSE_ANSI": "never",
}
NO_NETWORKS = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")


def docker(*arguments: str | Path, timeout: float = 60.0, stdin: IO[bytes] | None = None) -> str:
    """Standard output of one command to this daemon."""
    return run("docker", *arguments, timeout=timeout, env=ENVIRONMENT, stdin=stdin)


def remove_volumes() -> None:
    """Every one but that of compiled code."""
    if names := set(docker("volume", "ls", "--quiet").split()) - {"kvstore_cache"}:
        docker("volume", "rm", *names)


@contextmanager
def daemon() -> Iterator[None]:
    """Running meanwhile. What an earlier one left behind, killed before it could stop, is removed first."""
    clean()
    HERE.mkdir(parents=True, exist_ok=True)
    command = [
        *("setpriv", "--pdeathsig", "TERM", "dockerd", "--host", f"unix://{SOCKET}", "--data-root", HERE / "data"),
        *("--exec-root", HERE / "exec", "--pidfile", HERE / "docker.pid", "--userland-proxy=false", *NO_NETWORKS),
    ]
    with (HERE / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
    try:
        give_up = time.monotonic() + START_SECONDS
        while not SOCKET.exists():
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"dockerd did not start:\n{(HERE / 'log').read_text()[-4000:]}")
            time.sleep(0.1)
        if containers := docker("ps", "--all", "--quiet").split():
            docker("rm", "--force", *containers)
        remove_volumes()
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        clean()


def leftovers() -> list[str]:
    """Processes and mounts of the tests' folder."""
    return [f"process {number}" for number in _processes()] + [f"mount {path}" for path in _mounts()]


def clean() -> None:
    """Ends every process of the folder and unmounts everything in it. RuntimeError if that does not help."""
    for _ in range(20):
        for number in _processes():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for path in reversed(_mounts()):
            subprocess.run(["umount", "--lazy", path], check=False, timeout=20)
        if not leftovers():
            (HERE / "docker.pid").unlink(missing_ok=True)
            SOCKET.unlink(missing_ok=True)
            return
        time.sleep(0.2)
    raise RuntimeError(f"left behind: {', '.join(leftovers())}")


def _mounts() -> list[str]:
    with open("/proc/self/mounts") as mounts:
        return [path for line in mounts if (path := line.split()[1]).startswith(f"{FOLDER}/")]


def _processes() -> list[int]:
    """Of programs that lie in the folder, or for which it is the root, and all that they started."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if any(os.readlink(entry / link).startswith(f"{FOLDER}/") for link in ("exe", "root")):
                found.add(int(entry.name))
        except OSError:  # it has ended, or is the kernel's own
            continue
    while more := {number for number, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)
