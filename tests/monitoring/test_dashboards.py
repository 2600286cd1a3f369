"""Dashboards and alerts read only what a real server exports, and alerts fire when they should."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry

from kvstore_client import AsyncKVStoreClient, KVStoreError
from kvstore_codecs.named import shape_named

from ..running import serving
from .promql import Read, read_by

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
PROMTOOL = shutil.which("promtool")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def expressions() -> Iterator[tuple[str, str]]:
    """Where each expression stands, and the expression."""
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{file.name}: {panel['title']}", target["expr"].replace("$__rate_interval", "1m")
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alerts.yml: {rule['alert']}", rule["expr"]


def exported(registry: CollectorRegistry) -> Read:
    """What a scrape finds; `up` is made by Prometheus."""
    series, labels = {"up"}, {"le"}
    for family in registry.collect():
        series |= {family.name + suffix for suffix in SUFFIXES[family.type]}
        labels |= {name for sample in family.samples for name in sample.labels}
    return Read(frozenset(series), frozenset(labels))


def complaints(read: list[tuple[str, str]], found: Read) -> list[str]:
    return [
        f"{where}: {name}"
        for where, expression in read
        for wanted, there in zip(vars(read_by(expression)).values(), vars(found).values(), strict=True)
        for name in sorted(wanted - there)
    ]


async def exercise(target: str) -> None:
    """A bit of everything."""
    async with AsyncKVStoreClient(target) as client:
        session = await client.create_session("s", shape_named("1x1x2x32"))
        await session.append(*torch.randn(2, 1, 300, 1, 32).bfloat16(), start=session.length)
        for _ in range(3):
            await session.attend(0, torch.randn(1, 2, 32))
            await session.topk(0, torch.randn(1, 2, 32), 5)
        with pytest.raises(KVStoreError):
            await session.attend(0, torch.randn(1, 2, 32), end=1 << 20)


async def server_exports(folder: Path) -> Read:
    """Of a server that has done a bit of everything."""
    async with serving(folder, quality={"sample_share": 1.0}) as server:
        await exercise(f"127.0.0.1:{server.port}")
        return exported(server.telemetry.registry)


async def test_every_series_of_dashboards_and_alerts_is_exported_by_a_server(tmp_path: Path) -> None:
    found = await server_exports(tmp_path)
    read = list(expressions())
    assert len(read) > 40
    assert complaints(read, found) == []
    planted = [
        ("a", "sum(rate(kvstore_steps_total[5m]))"),
        ("b", 'sum by (customer) (up{job="kvstore"})'),
        ("c", 'grpc_server_handled_total{grpc_status="OK"} > 0'),
    ]
    assert complaints(planted, found) == ["a: kvstore_steps_total", "b: customer", "c: grpc_status"]


@pytest.mark.parametrize(
    ("expression", "series", "labels"),
    [
        ("up == 0", {"up"}, set()),
        ("histogram_quantile(0.99, sum by (le, lane) (rate(a_bucket[5m]))) > 0.1", {"a_bucket"}, {"le", "lane"}),
        ('rate(a{x="up", y!~"b.*"}[1h]) and on (instance) b_total > bool 3', {"a", "b_total"}, {"x", "y"}),
        ("sum(a) / sum(b offset 5m)", {"a", "b"}, set()),
    ],
)
def test_an_expression_is_read(expression: str, series: set[str], labels: set[str]) -> None:
    assert read_by(expression) == Read(frozenset(series), frozenset(labels))


def test_every_alert_says_what_to_do() -> None:
    text = (DEPLOY.parent / "docs" / "operations.md").read_text()
    for where, _ in expressions():
        file, _, alert = where.partition(": ")
        assert file != "alerts.yml" or f"| {alert} |" in text, f"docs/operations.md lacks {alert}"


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on PATH (Debian: apt-get install prometheus)")
def test_prometheus_can_read_every_expression(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    rules = [{"record": f"checked:{number}", "expr": each} for number, (_, each) in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    subprocess.run([PROMTOOL, "check", "rules", "--lint=none", file], check=True, timeout=60)
    file.write_text(file.read_text().replace("sum by (code)", "sum by code", 1))
    assert subprocess.run([PROMTOOL, "check", "rules", file], check=False, timeout=60).returncode != 0


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on PATH (Debian: apt-get install prometheus)")
@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("check", "config"), DEPLOY / "prometheus" / "prometheus.yml"),
        (("test", "rules"), Path(__file__).parent / "alerts_test.yml"),
    ],
)
def test_prometheus_accepts_the_rules_and_they_fire(command: tuple[str, str], file: Path) -> None:
    assert PROMTOOL is not None
    ran = subprocess.run([PROMTOOL, *command, str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
