"""A certificate authority for tests, and files of what it signed."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kvstore_client import Tls

HOUR = timedelta(hours=1)


class Authority:
    """Writes PEM files into `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._folder = folder
        self.file = folder / f"{name}.pem"
        made = self._signed(self._key, self._name, x509.BasicConstraints(ca=True, path_length=0))
        self.file.write_bytes(made.public_bytes(Encoding.PEM))

    def issue(self, name: str, *identities: str, expired: bool = False) -> tuple[Path, Path]:
        """(certificate, key) files, for these DNS names, addresses and URIs; written again if they are there."""
        key = ec.generate_private_key(ec.SECP256R1())
        subjects = x509.SubjectAlternativeName([_general(each) for each in identities or ("localhost", "127.0.0.1")])
        made = self._signed(key, x509.Name([]), subjects, expired)
        certificate, private = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate.write_bytes(made.public_bytes(Encoding.PEM))
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private

    def server_section(self, name: str = "server") -> dict[str, object]:
        """The settings `tls` of a server that asks clients for certificates of this authority."""
        certificate, key = self.issue(name)
        return {"certificate_file": certificate, "key_file": key, "client_ca_file": self.file}

    def client(self, name: str | None = None, *identities: str) -> Tls:
        """What a client is given; with a name it has a certificate."""
        certificate, key = self.issue(name, *identities) if name else (None, None)
        return Tls(self.file, certificate, key)

    def _signed(
        self, key: ec.EllipticCurvePrivateKey, subject: x509.Name, extension: x509.ExtensionType, expired: bool = False
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - 2 * HOUR)
            .not_valid_after(now - HOUR if expired else now + HOUR)
            .add_extension(extension, critical=True)
            .sign(self._key, hashes.SHA256())
        )


def _general(identity: str) -> x509.GeneralName:
    if "://" in identity:
        return x509.UniformResourceIdentifier(identity)
    try:
        return x509.IPAddress(ip_address(identity))
    except ValueError:
        return x509.DNSName(identity)
