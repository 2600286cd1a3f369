"""Prometheus with the settings and rules of deploy/prometheus, before servers on loopback. It dies with the tests."""

import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .program import Program, free_port
from .project_rules import ROOT

PROMETHEUS = shutil.which("prometheus")
START_SECONDS_MAX = 60


def ask(address: str, path: str, **parameters: str) -> Any:
    """The data of one answer of Prometheus; None while it does not answer."""
    url = f"http://{address}{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]
    except (urllib.error.URLError, ConnectionError):
        return None


@contextmanager
def prometheus(
    folder: Path, targets: Sequence[str], port: int = 0, every_seconds: int | None = None
) -> Generator[Program]:
    """With the repository's settings, but for where the servers are and, if it is said, how often it looks."""
    folder.mkdir()
    port = port or free_port()
    shutil.copy(ROOT / "deploy" / "prometheus" / "alerts.yml", folder)
    settings = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    if every_seconds is not None:
        settings["global"] = {"scrape_interval": f"{every_seconds}s", "evaluation_interval": f"{every_seconds}s"}
    settings["scrape_configs"][0].pop("dns_sd_configs")
    settings["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(settings))
    assert PROMETHEUS is not None
    options = (f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=error")
    command = [PROMETHEUS, *options, f"--web.listen-address=127.0.0.1:{port}"]
    program = Program("Prometheus", command, port, folder / "prometheus.log")
    try:
        program.wait(START_SECONDS_MAX, lambda: ask(program.address, "/api/v1/rules") is not None)
        yield program
    finally:
        program.stop()
