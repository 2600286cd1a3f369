"""How a client shows who it is and encrypts its connection: by arguments, or by the environment."""

import os
import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

PREFIX = "KVSTORE_TLS"
_OFF, _ON = ("", "0", "off", "false"), ("1", "on", "true")
_SCHEME = re.compile(r"^(dns:(//[^/]*/)?|ipv[46]:)")
_HOST_AND_PORT = re.compile(r"(\[[^]]+\]|[^:]+)(:\d+)?")


@dataclass(frozen=True)
class Tls:
    """PEM files. Without `ca_file` the server must be known to the roots that gRPC brings.

    `certificate_file` and `key_file` are the client's own, for servers that ask for one; `server_name` is what the
    server's certificate must say, if that is not the host of the target.
    """

    ca_file: str | Path | None = None
    certificate_file: str | Path | None = None
    key_file: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file are only used together")


@dataclass(frozen=True)
class Access:
    """What a transport needs to know."""

    api_key: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)


OPEN = Access()
"""To a server that asks for nothing."""


def access_to(target: str, api_key: str | None = None, tls: Tls | bool | None = None) -> Access:
    """What is None comes from KVSTORE_API_KEY and from KVSTORE_TLS (on or off) and KVSTORE_TLS_CA_FILE,
    KVSTORE_TLS_CERTIFICATE_FILE, KVSTORE_TLS_KEY_FILE and KVSTORE_TLS_SERVER_NAME, any of which means TLS.

    ValueError for a key that other machines could read on its way, unless `tls` is False or KVSTORE_TLS is off.
    """
    api_key = api_key or os.environ.get("KVSTORE_API_KEY") or None
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise ValueError("api_key: holds characters that no key has")
    tls = _from_environment() if tls is None else tls
    chosen = Tls() if tls is True else tls or None
    if api_key is not None and tls is None and not _is_near(target):
        raise ValueError(f"api_key: would travel to {target} unencrypted; give tls, or tls=False to allow that")
    return Access(api_key, chosen)


def _from_environment() -> Tls | bool | None:
    values = {
        name: os.environ.get(f"{PREFIX}_{name.upper()}") or None
        for name in ("ca_file", "certificate_file", "key_file", "server_name")
    }
    switch = os.environ.get(PREFIX, "").lower()
    if switch not in (*_OFF, *_ON):
        raise ValueError(f"{PREFIX}: {switch!r} is neither on nor off")
    if switch in _ON or (not switch and any(values.values())):
        return Tls(**values)
    return False if switch else None


def _is_near(target: str) -> bool:
    """Whether the target is on this machine."""
    if target.startswith("unix:"):
        return True
    address = _SCHEME.sub("", target)
    match = _HOST_AND_PORT.fullmatch(address)
    host = match[1].strip("[]") if match else address
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
