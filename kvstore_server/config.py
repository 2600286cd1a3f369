"""The settings: one YAML file, overridden by KVSTORE__SECTION__KEY, overridden by the command line."""

import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from kvstore_codecs.spec import DEFAULT, CodecSpec
from kvstore_server.access import Identity, Tls
from kvstore_server.limits import Limits, Name
from kvstore_server.section import Section
from kvstore_server.tenants import Quota, Tenant

ENV_PREFIX = "KVSTORE__"
BUCKETS = ("s3", "gs", "az")
INDEX_URL = re.compile(r"unix:///.+|rediss?://.+|rediss?\+cluster://[^/]+/?|rediss?\+sentinel://[^/]+/[^/]+(/[0-9]+)?")
Tree = dict[str, Any]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class ConfigError(Exception):
    """The settings cannot be used; the text names each key and why."""


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, value: object) -> object:
        """`host:port` or `[ipv6]:port`; what is no text is left for pydantic to refuse."""
        if not isinstance(value, str):
            return value
        host, _, port = value.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise ValueError(f"{value!r} is not host:port with a port below 65536")
        if (":" in host) != (host.startswith("[") and host.endswith("]")):
            raise ValueError("an IPv6 host is written in brackets, as in [::1]:7700")
        return cls(host.strip("[]"), int(port))

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


AddressText = Annotated[Address, NoDecode, BeforeValidator(Address.parse)]


class Listen(Section):
    """Where the service answers."""

    address: AddressText = Address("127.0.0.1", 7700)
    """gRPC: the store, health and reflection."""
    mtls_address: AddressText | None = None
    """gRPC for callers that show a certificate of tls.client_ca_file."""
    metrics_address: AddressText | None = Address("127.0.0.1", 7701)
    """HTTP /metrics; null switches it off."""
    reflection: bool = False
    """Describe the API to anyone who asks (grpc.reflection.v1alpha)."""
    insecure: bool = False
    """Allow an `address` that other machines reach without identity or TLS, and such a `metrics_address`."""


class Storage(Section):
    """Where the facts are."""

    url: str = "kvstore-data"
    """A local folder (a path or file:///path), or a bucket: s3://name/path, gs://name/path, az://container/path."""
    endpoint: str | None = None
    """Of a bucket: the service's URL, if it is not the provider's own: http://minio:9000."""
    region: str | None = None
    """Of a bucket on S3."""
    request_seconds: Seconds = 20.0
    """How long one request to a bucket may take."""
    retry_seconds: Seconds = 60.0
    """For how long a request to a bucket that failed is tried again."""

    @field_validator("url")
    @classmethod
    def _known(cls, value: str) -> str:
        if not value.strip() or "\0" in value:
            raise ValueError("must name a folder or a bucket")
        url = urlsplit(value)
        if "://" in value and (url.scheme not in ("file", *BUCKETS) or bool(url.netloc) != (url.scheme in BUCKETS)):
            raise ValueError("must be a path, file:///path, s3://bucket, gs://bucket or az://container")
        if "@" in url.netloc:
            raise ValueError("holds credentials: they belong into the provider's environment variables")
        return value

    @property
    def kind(self) -> str:
        """`local`, or what the bucket's url starts with."""
        scheme = self.url.partition("://")[0]
        return scheme if scheme in BUCKETS else "local"

    @property
    def folder(self) -> Path:
        """Of a local store."""
        return Path(self.url.removeprefix("file://"))


class Index(Section):
    """Where derived facts are kept."""

    url: str = "memory"
    """`memory`; or, to share it between servers, redis://user@host:port/db, unix:///socket,
    redis+sentinel://user@host:port,host:port/service/db or redis+cluster://user@host:port,host:port. With rediss for
    redis: over TLS."""
    password: SecretStr | None = None
    """Of Redis; never in the url, which is logged."""
    password_file: Path | None = None
    """A file that holds the password."""
    tls_ca_file: Path | None = None
    """Certificates to trust over TLS instead of the system's."""
    timeout_seconds: Seconds = 1.0
    """How long one command to Redis may take."""

    @field_validator("url")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "memory":
            return value
        if not INDEX_URL.fullmatch(value):
            raise ValueError(
                "must be memory, redis://host, unix:///socket, redis+sentinel://host,host/service or "
                "redis+cluster://host,host (rediss: TLS)"
            )
        if urlsplit(value).password is not None:
            raise ValueError("holds a password: use index.password or index.password_file instead")
        return value

    @model_validator(mode="after")
    def _one_password(self) -> "Index":
        if self.password is not None and self.password_file is not None:
            raise ValueError("password and password_file are both set")
        return self

    def read_password(self) -> str | None:
        """The password, if there is one; ConfigError if its file cannot be read."""
        if self.password_file is None:
            return self.password.get_secret_value() if self.password else None
        try:
            return self.password_file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"index.password_file: {error}") from error


class Device(Section):
    """Where queries are computed."""

    name: Annotated[str, Field(pattern=r"^(auto|cpu|cuda:\d{1,2})$")] = "auto"
    """`cpu`, `cuda:N`, or `auto`: the first CUDA device that passes the self-check, else the CPU."""
    memory_bytes: Annotated[int, Field(ge=64 << 20)] | None = None
    """For pages and exact rows of sessions on the device; null: `memory_share` of what is free at the start."""
    memory_share: Annotated[float, Field(gt=0, le=0.95)] = 0.8
    """The rest is for bases, staging and the scratch memory of queries."""
    staging_bytes: Annotated[int, Field(ge=16 << 20)] = 1 << 30
    """For one layer of a session that does not fit in the other memory."""


class Memory(Section):
    """Host memory."""

    host_bytes_max: Annotated[int, Field(ge=64 << 20)] = 4 << 30
    """What loaded sessions may take; the least recently used go first, and are read again from the store."""


class Quality(Section):
    """Answers that are computed again from vectors kept exactly, for the quality metrics."""

    sample_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Of the answers for which exact vectors are kept; 0 keeps none."""
    exact_bytes_max: Annotated[int, Field(ge=0)] = 64 << 20
    """Host memory for them: one layer of each of the youngest sessions."""


class Merge(Section):
    """Small neighbouring objects of a session become one, in the background."""

    objects_min: Annotated[int, Field(ge=2)] | None = 64
    """So many at a time at least; null: none."""
    object_bytes_max: Annotated[int, Field(ge=1 << 16, le=1 << 30)] = 64 << 20
    """What one of them may grow to, and one merge reads and writes."""
    bytes_per_second_max: Annotated[int, Field(ge=1)] = 32 << 20
    """What one server reads and writes for it, on average."""


class Downgrade(Section):
    """Sessions that nobody uses lose bits, for good; pinned ones and those that forks share never."""

    unused_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """After so long without a use, as seen by one server that runs all the while; null: never."""
    keys_level: Annotated[int, Field(ge=0, le=63)] = 1
    """The finest level of keys that is kept; 0 keeps all."""
    values_level: Annotated[int, Field(ge=0, le=63)] = 1
    """Likewise of values."""


class Log(Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines that are written."""
    format: Literal["text", "json"] = "text"
    """`json` writes one object a line."""
    spans_endpoint: str | None = None
    """An OpenTelemetry collector, as in http://localhost:4317, that is sent one span a call (extra `otel`)."""
    audit_file: Path | None = None
    """Who created, changed, forked or deleted what or was refused, one JSON object a line; null: not noted."""


class Settings(BaseSettings):
    """Everything that can be set. Read once at the start, by `load`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        use_attribute_docstrings=True,
    )

    listen: Listen = Listen()
    identity: Identity = Identity()
    tls: Tls = Tls()
    storage: Storage = Storage()
    index: Index = Index()
    device: Device = Device()
    memory: Memory = Memory()
    limits: Limits = Limits()
    quota: Quota = Quota()
    tenants: dict[Name, Tenant] = Field(default_factory=dict)
    """Those that have a weight or a quota of their own."""
    quality: Quality = Quality()
    merge: Merge = Merge()
    downgrade: Downgrade = Downgrade()
    log: Log = Log()
    codec: CodecSpec = DEFAULT
    """For sessions that are created without one (docs/codecs.md)."""
    drain_seconds: Seconds = 30.0
    """How long a stopping server answers what it has admitted."""
    staleness_seconds: Seconds = 2.0
    """For how long another server's delete or append may go unnoticed."""
    sweep_seconds: Seconds = 15.0
    """Within it the index is told which sessions were used, and one of its servers looks for unused ones."""
    gc_grace_seconds: Seconds = 3_600.0
    """For how long the data of an expired session can still be read by those who know its generation, and those of a
    deleted one lie in the store."""

    @model_validator(mode="after")
    def _guarded(self) -> "Settings":
        listen, encrypted = self.listen, self.tls.certificate_file is not None
        guarded = self.identity.is_asked and encrypted
        for name, address in (("address", listen.address), ("metrics_address", listen.metrics_address)):
            if address is not None and not (address.is_loopback or listen.insecure or (guarded and name == "address")):
                need = "needs identity and tls" if name == "address" else "is open to anyone"
                raise ValueError(
                    f"listen.{name} {address} can be reached from other machines and {need}; set insecure to allow that"
                )
        if (listen.mtls_address is None) != (self.tls.client_ca_file is None):
            raise ValueError("listen.mtls_address and tls.client_ca_file are only used together")
        if listen.mtls_address is not None and not guarded:
            raise ValueError("listen.mtls_address: needs identity and tls.certificate_file")
        if self.identity.certificates and listen.mtls_address is None:
            raise ValueError("identity.certificates: needs listen.mtls_address")
        return self

    def weight_of(self, tenant: str) -> int:
        return self.tenants[tenant].weight if tenant in self.tenants else 1

    def quota_of(self, tenant: str) -> Quota:
        return (self.tenants[tenant].quota if tenant in self.tenants else None) or self.quota

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def load(file: Path | None = None, overrides: Tree | None = None) -> Settings:
    """The settings from `file` (default: what KVSTORE_CONFIG names, if anything), the environment and `overrides`.

    `overrides` has the file's form: {"listen": {"insecure": True}}. Raises ConfigError, one line for each wrong key.
    """
    if file is None and (named := os.environ.get("KVSTORE_CONFIG")):
        file = Path(named)
    if unknown := [name for name in os.environ if name.upper().startswith(ENV_PREFIX) and not _is_known(name)]:
        raise ConfigError("\n".join(f"{name}: unknown key" for name in sorted(unknown)))
    document = {} if file is None else _read(file)
    try:
        return Settings(**_merged(_merged(document, EnvSettingsSource(Settings)()), overrides or {}))
    except ValidationError as error:
        raise ConfigError("\n".join(_line(each) for each in error.errors())) from None
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from error


def _read(file: Path) -> Tree:
    try:
        document = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: {error}") from error
    except yaml.YAMLError as error:  # whose own text shows lines of the file, which may hold a password
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}: {getattr(error, 'problem', None) or 'is no YAML'}{line}") from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in cast(dict[object, Any], document)):
        raise ConfigError(f"{file}: must map the names of settings to values")
    return cast(Tree, document)


def _merged(below: Tree, above: Tree) -> Tree:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = _merged(cast(Tree, under), cast(Tree, value)) if both else value
    return merged


def _is_known(env_name: str) -> bool:
    section, *keys = env_name[len(ENV_PREFIX) :].lower().split("__")
    field = Settings.model_fields.get(section)
    if field is None or not keys:
        return field is not None
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _line(error: ErrorDetails) -> str:
    why = "unknown key" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, error['loc']))}: {why}".removeprefix(": ")
