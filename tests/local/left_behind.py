"""What a program that has ended may not leave: processes that it started, ports that still answer, files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..program import accepts


def family(pid: int) -> dict[int, str]:
    """A process and all that descend from it: process id to when it started, which tells it from a later namesake."""
    stats = dict(filter(None, map(_stat, Path("/proc").glob("[0-9]*"))))
    found, looked = [pid], 0
    while looked < len(found):
        found += [child for child, (parent, _) in stats.items() if parent == found[looked]]
        looked += 1
    return {each: stats[each][1] for each in found if each in stats}


def left_behind(processes: Mapping[int, str], addresses: Iterable[str], folder: Path) -> list[str]:
    """One line for each thing that is still there."""
    alive = [pid for pid, started in processes.items() if family(pid).get(pid) == started]
    return [
        *(f"process {pid}: {Path(f'/proc/{pid}/cmdline').read_text()!r}" for pid in alive),
        *(f"{address} answers" for address in addresses if accepts(address)),
        *([str(folder)] if folder.exists() else []),
    ]


def _stat(process: Path) -> tuple[int, tuple[int, str]] | None:
    """Its id, its parent's and its start; None if it has ended or nobody has asked yet how it ended."""
    try:
        fields = (process / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(process.name), (int(fields[1]), fields[19]))
