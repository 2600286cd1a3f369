"""`python -m tests.security.fuzzing.guided PARSER FOLDER SECONDS [--planted]`: fuzzes one parser, guided by coverage.

Exit code 0 if nothing was found. The folder holds what to start from; what breaks the parser is left there, too.
"""

import resource
import sys
import tracemalloc
from importlib import import_module
from pathlib import Path

INPUT_BYTES_MAX = 16 << 10
NATIVE_BYTES_MAX = 512 << 20
"""Address space beyond what is there at the start: an allocation by what an input claims fails."""


def main() -> None:
    atheris = import_module("atheris")  # is there only where `make test-security` put it
    with atheris.instrument_imports(include=["kvstore_server", "kvstore_codecs"]):
        from .parsers import PARSERS, examine

    name, folder, seconds = sys.argv[1:4]
    parser = PARSERS[name]
    if "--planted" in sys.argv:
        setattr(*parser.planted)
    tracemalloc.start()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + NATIVE_BYTES_MAX
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        "-timeout=10",
        f"-artifact_prefix={folder}/found-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, folder], lambda data: examine(parser, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
