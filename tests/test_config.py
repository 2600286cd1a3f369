from pathlib import Path

import pytest

from kvstore_server.config import Address, ConfigError, Section, Settings, load
from kvstore_server.limits import SESSION_NAME, Limits


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_CONFIG", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kvstore.yaml"


def test_defaults_need_no_file_and_listen_on_loopback() -> None:
    settings = load()
    assert (str(settings.listen.address), str(settings.listen.metrics_address)) == ("127.0.0.1:7700", "127.0.0.1:7701")
    assert settings.index.url == "memory"
    assert (settings.storage.kind, settings.storage.folder) == ("local", Path("kvstore-data"))


def test_environment_overrides_file_and_command_line_overrides_both(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("listen: {address: '127.0.0.1:1', reflection: true}\ndrain_seconds: 1\nstaleness_seconds: 1\n")
    monkeypatch.setenv("KVSTORE__LISTEN__ADDRESS", "127.0.0.1:2")
    monkeypatch.setenv("KVSTORE__DRAIN_SECONDS", "2")
    settings = load(file, {"drain_seconds": 3})
    assert (settings.listen.address.port, settings.listen.reflection) == (2, True)
    assert (settings.drain_seconds, settings.staleness_seconds) == (3, 1)


def test_the_file_may_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("drain_seconds: 7\n")
    monkeypatch.setenv("KVSTORE_CONFIG", str(file))
    assert load().drain_seconds == 7


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    file.write_text("")
    assert load(file) == load()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("listen: {adress: '127.0.0.1:1'}", "listen.adress: unknown key"),
        ("listening: {}", "listening: unknown key"),
        ("drain_seconds: soon", "drain_seconds: Input should be a valid number"),
        ("drain_seconds: .nan", "drain_seconds: "),
        ("limits: {topk_max: 0}", "limits.topk_max: Input should be greater than or equal to 1"),
        ("limits: {frame_bytes_max: 16777216}", "limits: a frame of frame_bytes_max"),
        ("limits: {deadline_default_seconds: 900}", "limits: deadline_default_seconds 900 is more than"),
        ("listen: {address: localhost}", "listen.address: 'localhost' is not host:port"),
        ("listen: {address: '127.0.0.1:65536'}", "listen.address: '127.0.0.1:65536' is not host:port"),
        ("listen: {address: '::1:7700'}", "listen.address: an IPv6 host is written in brackets"),
        ("listen: {address: 7700}", "listen.address: "),
        ("storage: {url: 'ftp://bucket'}", "storage.url: must be a path, file:///path, s3://bucket"),
        ("storage: {url: 's3:///bucket'}", "storage.url: must be"),
        ("storage: {url: 'file://host/folder'}", "storage.url: must be"),
        ("storage: {url: 's3://key:secret@bucket'}", "storage.url: holds credentials"),
        ("index: {url: 'http://x'}", "index.url: must be memory"),
        ("index: {url: 'redis+sentinel://x'}", "index.url: must be memory"),
        ("device: {name: gpu}", "device.name: "),
        ("codec: {keys: {name: rotated, planes: 9}, values: {name: raw}}", "codec.keys.rotated.planes: "),
        ("listen: [1", "kvstore.yaml: "),
        ("- a list", "kvstore.yaml: must map"),
        ("1: 2", "kvstore.yaml: must map"),
        ("drain_seconds: !!python/object/apply:os.getcwd []", "kvstore.yaml: could not determine a constructor"),
        ("listen: 7", "listen: "),
    ],
)
def test_a_wrong_file_is_refused_by_the_name_of_the_key(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert complaint in str(raised.value)


def test_every_wrong_key_is_named_at_once(file: Path) -> None:
    file.write_text("a: 1\nlog: {level: loud}\n")
    with pytest.raises(ConfigError, match=r"(?s)a: unknown key.*log\.level|log\.level.*a: unknown key"):
        load(file)


def test_a_missing_file_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(file)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("KVSTORE__LISTEN__ADRESS", "listen.adress: unknown key"),
        ("KVSTORE__LISTENING", "KVSTORE__LISTENING: unknown key"),
        ("KVSTORE__DRAIN_SECONDS__X", "KVSTORE__DRAIN_SECONDS__X: unknown key"),
        ("KVSTORE__CODEC", "codec"),
    ],
)
def test_a_wrong_environment_variable_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=complaint):
        load()


@pytest.mark.parametrize("key", ["address", "metrics_address"])
@pytest.mark.parametrize("address", ["0.0.0.0:7700", "[::]:7700", "192.0.2.1:7700", "store.example:7700"])
def test_a_reachable_address_needs_insecure(key: str, address: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} .* can be reached from other machines"):
        load(overrides={"listen": {key: address}})
    assert str(getattr(load(overrides={"listen": {key: address, "insecure": True}}).listen, key)) == address


@pytest.mark.parametrize("address", ["127.0.0.2:0", "[::1]:7700", "localhost:7700"])
def test_a_loopback_address_needs_nothing(address: str) -> None:
    assert load(overrides={"listen": {"address": address}}).listen.address == Address.parse(address)


def test_metrics_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE__LISTEN__METRICS_ADDRESS", "null")
    assert load().listen.metrics_address is None


def test_a_password_is_never_shown_and_never_in_the_url(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    from_file = load(overrides={"index": {"password_file": secret}})
    given = load(overrides={"index": {"password": "hunter2"}})
    assert from_file.index.read_password() == given.index.read_password() == "hunter2"
    assert "hunter2" not in repr(given) + given.model_dump_json()
    with pytest.raises(ConfigError) as raised:
        load(overrides={"index": {"url": "redis://:hunter2@localhost"}})
    assert "index.url" in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_an_unreadable_password_file_is_named(tmp_path: Path) -> None:
    index = load(overrides={"index": {"password_file": tmp_path / "absent"}}).index
    with pytest.raises(ConfigError, match=r"index\.password_file: .*absent"):
        index.read_password()


def test_settings_do_not_change_after_the_start() -> None:
    settings = load()
    with pytest.raises(ValueError, match="frozen"):
        settings.listen.insecure = True  # pyright: ignore[reportAttributeAccessIssue]


def test_every_setting_explains_itself() -> None:
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    models = [Settings, *(m for m in sections.values() if isinstance(m, type) and issubclass(m, Section | Limits))]
    silent = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.description and field.annotation not in models
    ]
    assert len(models) == 14
    assert silent == []


def test_limits_are_published_as_whole_numbers() -> None:
    published = Limits().as_dict()
    assert published["message_bytes_max"] == 16 << 20
    assert all(type(value) is int and 0 < value < 2**64 for value in published.values())


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "a..b", "x" * 128])
def test_a_session_may_be_called(name: str) -> None:
    assert SESSION_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", ".", "..", "_a", "-a", "a/b", "a\0", "a\n", "é", "a b", "x" * 129, "\u0661"])
def test_a_session_may_not_be_called(name: str) -> None:
    assert not SESSION_NAME.fullmatch(name)


PAIR = "certificate_file: a.crt, key_file: a.key"
GUARDED = f"identity: {{api_keys: true}}\ntls: {{{PAIR}}}\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "listen: {address: '0.0.0.0:1'}",
            "listen.address 0.0.0.0:1 can be reached from other machines and needs identity",
        ),
        ("identity: {api_keys: true}\nlisten: {address: '0.0.0.0:1'}", "listen.address 0.0.0.0:1 can be reached"),
        (f"tls: {{{PAIR}}}\nlisten: {{address: '0.0.0.0:1'}}", "listen.address 0.0.0.0:1 can be reached"),
        (GUARDED + "listen: {metrics_address: '0.0.0.0:1'}", "listen.metrics_address 0.0.0.0:1 can be reached"),
        ("tls: {key_file: a}", "tls: certificate_file and key_file are only used together"),
        (GUARDED + "listen: {mtls_address: '127.0.0.1:1'}", "listen.mtls_address and tls.client_ca_file are only used"),
        (
            f"listen: {{mtls_address: '127.0.0.1:1'}}\ntls: {{{PAIR}, client_ca_file: ca}}",
            "listen.mtls_address: needs identity and tls.certificate_file",
        ),
        (
            "identity: {certificates: {a: {tenant: a, role: reader}}}",
            "identity.certificates: needs listen.mtls_address",
        ),
        ("identity: {certificates: {a: {tenant: a/b, role: reader}}}", "identity.certificates.a.tenant: "),
        ("tenants: {a/b: {weight: 2}}", "tenants.a/b"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight: "),
        ("limits: {connection_grace_seconds: 60}", "limits: connection_grace_seconds 60 cuts off Attend streams"),
        ("identity: {certificates: {a: {tenant: a, role: root}}}", "identity.certificates.a.role: "),
    ],
)
def test_a_server_that_is_not_guarded_does_not_start(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert str(raised.value).startswith(complaint)


def test_a_guarded_server_may_be_reached_from_other_machines(file: Path) -> None:
    file.write_text(GUARDED + "listen: {address: '0.0.0.0:1'}")
    assert not load(file).listen.insecure


def test_what_is_wrong_in_a_file_is_said_without_its_lines(file: Path) -> None:
    file.write_text("index:\n  password: canary-password\n  url: [")
    with pytest.raises(ConfigError, match="in line") as raised:
        load(file)
    assert "canary" not in str(raised.value)


def test_a_tenant_may_have_a_weight_and_a_quota_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "kvstore.yaml"
    file.write_text("quota: {sessions_max: 5}\ntenants: {a: {weight: 3}, b: {quota: {stored_bytes_max: 7}}}\n")
    settings = load(file)
    assert [settings.weight_of(tenant) for tenant in "abc"] == [3, 1, 1]
    assert [settings.quota_of(tenant).sessions_max for tenant in "abc"] == [5, None, 5]
    assert settings.quota_of("b").stored_bytes_max == 7
