"""What a server holds at one moment: of the kernel, of its own metrics, of its folder."""

import os
from pathlib import Path
from urllib.request import urlopen

METRICS = {
    "kvstore_resident_bytes": "rows in memory, MiB",
    "kvstore_resident_sessions": "sessions in memory",
    "kvstore_sessions": "sessions",
    "kvstore_quality_kept_bytes": "kept to compare with, MiB",
    "kvstore_merged_objects": "merges so far",
}


def memory_bytes(process: int | str, what: str) -> int:
    """VmRSS is what the process has, VmHWM the most that it has had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))


def sample(process: int, metrics_url: str, store: Path) -> dict[str, float]:
    """Name to value; blocking."""
    with urlopen(metrics_url, timeout=10) as page:
        lines = [line.split() for line in page.read().decode().splitlines() if not line.startswith("#")]
    values = {METRICS[line[0]]: float(line[-1]) for line in lines if line[0] in METRICS}
    values = {name: value / 2**20 if name.endswith("MiB") else value for name, value in values.items()}
    return {
        "memory, MiB": memory_bytes(process, "VmRSS") / 2**20,
        "descriptors": len(os.listdir(f"/proc/{process}/fd")),
        "threads": len(os.listdir(f"/proc/{process}/task")),
        **values,
        "objects in the store": sum(1 for _ in store.rglob("*.safetensors")),
    }
