"""Settings: who may come in, and how connections are encrypted."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from kvstore_server.identity.caller import Role
from kvstore_server.limits import Name
from kvstore_server.section import Section

SubjectName = Annotated[str, Field(min_length=1, max_length=2048)]


class CertificateHolder(Section):
    """What a client certificate stands for."""

    tenant: Name
    role: Role


class Identity(Section):
    """How callers say who they are; with neither everybody is the admin of tenant `default`."""

    api_keys: bool = False
    """Accept keys that `kvstore keys create` has put into the store."""
    certificates: dict[SubjectName, CertificateHolder] = Field(default_factory=dict)
    """By a certificate's subject alternative name, a DNS name or a URI, for callers of listen.mtls_address."""

    @property
    def is_asked(self) -> bool:
        return self.api_keys or bool(self.certificates)


class Tls(Section):
    """PEM files, read again when they change."""

    certificate_file: Path | None = None
    """The server's chain, for both listen.address and listen.mtls_address; null serves without TLS."""
    key_file: Path | None = None
    """Its private key."""
    client_ca_file: Path | None = None
    """Who signs the certificates of callers of listen.mtls_address."""

    @model_validator(mode="after")
    def _pair(self) -> "Tls":
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file are only used together")
        return self
