"""`python -m tests.security.fuzzing.large PARSER FILE`: prints what bytes the process gained by reading the file.

Python's own accounts miss what torch takes, the kernel's peak of resident memory does not.
"""

import sys
from contextlib import suppress
from pathlib import Path

from .live import peak_bytes
from .parsers import PARSERS


def main() -> None:
    parser, data = PARSERS[sys.argv[1]], Path(sys.argv[2]).read_bytes()
    with suppress(*parser.errors):
        parser.parse(data[:-1])  # what is loaded at the first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = peak_bytes("self")
    with suppress(*parser.errors):
        parser.parse(data)
    print(peak_bytes("self") - before)


if __name__ == "__main__":
    main()
