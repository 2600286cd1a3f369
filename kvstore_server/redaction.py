"""What must not be read in logs and metrics: secrets are cut out, tenants get pseudonyms."""

import os
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256

SECRET_CHARACTERS_MIN = 8
"""A shorter value would be cut out of words that only look like it."""
HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|_KEY$|CONNECTION_STRING|CREDENTIAL", re.IGNORECASE)
_NAMED = r"(\b\w*(?:password|secret|api_?key|access_key)['\"]?\s*[=:]\s*)(?:'[^']*'|\"[^\"]*\"|[^\s,)}]+)"
_PATTERNS = [
    (re.compile(r"(kvs_[0-9a-f]{16}_)[A-Za-z0-9_-]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(\bbearer\s+)(?!kvs_)[^\s'\",)]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(://[^\s:/@]*:)[^\s/@]+(?=@)"), rf"\1{HIDDEN}"),
    (re.compile(_NAMED, re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
]


class Redactor:
    """Cuts out what has the form of a secret, and the very values that it is given."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        longest_first = sorted(
            {value for value in values if len(value) >= SECRET_CHARACTERS_MIN}, key=len, reverse=True
        )
        self._values = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, text: str) -> str:
        if self._values is not None:
            text = self._values.sub(HIDDEN, text)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text


def secrets_in(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of variables whose names say that they are secret."""
    return [value for name, value in environment.items() if _SECRET_NAME.search(name)]


def pseudonym(tenant: str) -> str:
    """Twelve hex digits: what a tenant is called in log lines and metrics. Who knows the name can compute it."""
    return sha256(f"kvstore.tenant {tenant}".encode()).hexdigest()[:12]


def session_pseudonym(tenant: str, session: str) -> str:
    """Its tenant's pseudonym and twelve digits of its own: what tells it from others on a page that anyone may read."""
    own = sha256(f"kvstore.session {tenant} {session}".encode()).hexdigest()[:12]
    return f"{pseudonym(tenant)}/{own}"
