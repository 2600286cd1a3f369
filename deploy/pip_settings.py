"""Turns `pip config list` (on standard input) into shell exports for uv, which does not read pip's settings."""

import os
import shlex
import sys
from ast import literal_eval

SEPARATORS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
PRECEDENCE = ["global", "install", ":env:"]


def exports(listing: str) -> list[str]:
    """One `export` line for each setting that uv has too and that its own variable does not set already."""
    values: dict[str, str] = {}
    for section in PRECEDENCE:
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                values[name.removeprefix(f"{section}.").lstrip(".")] = literal_eval(value)
    lines = ["export UV_INDEX_STRATEGY=unsafe-best-match"]  # pip looks at all its indexes alike
    for name, (variable, separator) in SEPARATORS.items():
        if name in values and variable not in os.environ:
            lines.append(f"export {variable}={shlex.quote(separator.join(values[name].split()))}")
    return lines


if __name__ == "__main__":
    print("\n".join(exports(sys.stdin.read())))
