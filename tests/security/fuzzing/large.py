"""`python -m tests.security.fuzzing.large PARSER FILE`: prints what bytes the process gained by reading the file.

Python's own accounts miss what torch takes, the kernel's peak of resident memory does not.
"""

import sys
from contextlib import suppress
from pathlib import Path

from ...soak.gauges import memory_bytes
from .parsers import PARSERS


def main() -> None:
    parser, data = PARSERS[sys.argv[1]], Path(sys.argv[2]).read_bytes()
    with suppress(*parser.errors):
        parser.parse(data[:-1])  # what is loaded at the first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = memory_bytes("self", "VmHWM")
    with suppress(*parser.errors):
        parser.parse(data)
    print(memory_bytes("self", "VmHWM") - before)


if __name__ == "__main__":
    main()
