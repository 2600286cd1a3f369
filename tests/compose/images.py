"""The images of the stack where none can be pulled: a base made of Debian's packages, and stand-ins for the others."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from ..project_rules import ROOT
from .daemon import docker
from .tools import FOLDER, TOOLS, run

BASE = "python:3.12-slim"
BASE_SECONDS, BUILD_SECONDS = 900.0, 1800.0
PACKAGES = "ca-certificates,python3,python3-pip,python3-venv,python-is-python3"
LOOPBACK = "kvstore-test/loopback"


def build_base() -> None:
    """Debian with its Python, called like the image that deploy/Dockerfile begins with.

    pip and uv find in it what they find here: the certificates to trust, and builds of torch in a find-links folder.
    """
    if docker("images", "-q", BASE).strip():
        return
    root = FOLDER / "base"
    shutil.rmtree(root, ignore_errors=True)
    environment = {**os.environ, "DEBOOTSTRAP_DIR": str(TOOLS / "usr" / "share" / "debootstrap")}
    codename = run("sh", "-c", ". /etc/os-release && echo $VERSION_CODENAME", timeout=10).strip()
    bootstrap = TOOLS / "usr" / "sbin" / "debootstrap"
    run(bootstrap, "--variant=minbase", f"--include={PACKAGES}", codename, root, env=environment, timeout=BASE_SECONDS)
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    if Path(certificates).exists():
        shutil.copy(certificates, f"{root}{certificates}")
    (root / "wheels").mkdir()
    for wheel in torch_wheels():
        shutil.copy(wheel, root / "wheels")
    settings = f"ENV SSL_CERT_FILE={certificates} PIP_CERT={certificates} UV_FIND_LINKS=/wheels"
    if index := os.environ.get("UV_DEFAULT_INDEX"):
        settings += f" UV_DEFAULT_INDEX={index} PIP_INDEX_URL={index}"
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as archive:
        docker("import", "--change", settings, "-", BASE, stdin=archive.stdout, timeout=BASE_SECONDS)
    shutil.rmtree(root)


def torch_wheels() -> list[Path]:
    """In the find-links folders of pip's settings."""
    folders = [Path(each) for each in os.environ.get("UV_FIND_LINKS", "").split(",") if each]
    return [wheel for folder in folders for wheel in folder.glob("torch-*.whl")]


def layers(image: str) -> tuple[int, str]:
    """Bytes of its layer of code, and what it has over its base, in words."""
    code, dependencies = map(int, docker("history", "--human=false", "--format={{.Size}}", image).split()[:2])
    return code, f"{dependencies / 1e6:,.0f} MB of dependencies and {code / 1e6:.1f} MB of code over its base"


def build_standins(images: dict[str, str], progress: Callable[[str], None]) -> None:
    """`images`: of each service of the stack. One is built for each that is not the repository's own."""
    context = FOLDER / "context"
    context.mkdir(exist_ok=True)
    for needed in (ROOT / "constraints.txt", ROOT / "tests" / "s3_server.py"):
        shutil.copy(needed, context)
    for service in ("loopback", "redis", "envoy", "prometheus", "minio"):
        name = LOOPBACK if service == "loopback" else images[service]
        progress(f"stand-in for {name}")
        file = Path(__file__).parent / "standins.Dockerfile"
        command = ("build", "--quiet", "--network=host", "--target", service, "--tag", name, "--file", file, context)
        docker(*command, timeout=BUILD_SECONDS)
