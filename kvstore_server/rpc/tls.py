"""Where gRPC listens, and with which certificates."""

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

from kvstore_server.access import Tls
from kvstore_server.config import ConfigError, Settings

LOG = logging.getLogger(__name__)
Stamp = tuple[tuple[int, int, int], ...]


class ReloadedCertificates:
    """The files of `tls`, looked at before each handshake. Files that do not fit each other are not taken up.

    gRPC takes TLS 1.2 and later.
    """

    def __init__(self, tls: Tls, *, of_clients: bool) -> None:
        assert tls.certificate_file is not None
        assert tls.key_file is not None
        self._pair = tls.certificate_file, tls.key_file
        self._client_ca = tls.client_ca_file if of_clients else None
        self._taken: Stamp = ()
        self._refused: Stamp = ()

    def credentials(self) -> grpc.ServerCredentials:
        """ConfigError if the files cannot be used."""
        try:
            first = self._read()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls: {_why(error)}") from None
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._changed)  # its stub knows no None
        return grpc.dynamic_ssl_server_credentials(first, fetch, self._client_ca is not None)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """On a thread of gRPC, at each handshake; None keeps what there is."""
        try:
            stamp = self._stamp()
            if stamp in (self._taken, self._refused):
                return None
            self._refused = stamp
            fresh = self._read()
        except (OSError, ssl.SSLError) as error:
            LOG.error("the certificate files changed and cannot be used; the old ones go on: %s", _why(error))
            return None
        LOG.info("the certificate files changed and were read again")
        return fresh

    def _read(self) -> grpc.ServerCertificateConfiguration:
        stamp = self._stamp()
        certificate, key = self._pair
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password="")  # refuses what does not fit; never asks at a terminal
        pair = key.read_bytes(), certificate.read_bytes()
        roots = None
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
            roots = self._client_ca.read_bytes()
        if stamp != self._stamp():
            raise OSError("they changed while they were read")
        self._taken = stamp
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def _stamp(self) -> Stamp:
        files: tuple[Path, ...] = self._pair if self._client_ca is None else (*self._pair, self._client_ca)
        facts = [file.stat() for file in files]
        return tuple((each.st_mtime_ns, each.st_ino, each.st_size) for each in facts)


def open_ports(server: grpc.aio.Server, settings: Settings) -> tuple[int, int]:
    """The ports of listen.address and listen.mtls_address, 0 for one that is not set."""
    listen, tls = settings.listen, settings.tls
    if tls.certificate_file is None:
        return server.add_insecure_port(str(listen.address)), 0
    for_all = ReloadedCertificates(tls, of_clients=False).credentials()
    port = server.add_secure_port(str(listen.address), for_all)
    if listen.mtls_address is None:
        return port, 0
    for_certified = ReloadedCertificates(tls, of_clients=True).credentials()
    return port, server.add_secure_port(str(listen.mtls_address), for_certified)


def _why(error: OSError | ssl.SSLError) -> str:
    """Without anything of what the files hold."""
    if isinstance(error, ssl.SSLError):
        return f"a certificate or key is no PEM or does not fit the other ({error.reason})"
    return str(error)
