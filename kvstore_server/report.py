"""What the command line prints about servers and sessions."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from kvstore_client import ServerInfo, SessionInfo


def print_info(info: ServerInfo) -> None:
    table = Table(title=f"kvstore {info.version} on {info.device}")
    table.add_column("limit")
    table.add_column("value", justify="right")
    for name, value in sorted(info.limits.items()):
        table.add_row(name, f"{value:,}")
    console = Console()
    console.print(table)
    console.print(f"store {info.store}, index {info.index}, format {info.format_version}", highlight=False)
    console.print(f"codecs {', '.join(info.codecs)}; default {info.default_codec_json}", highlight=False)


def print_sessions(sessions: Iterable[SessionInfo]) -> None:
    table = Table()
    for name in ("session", "codec K / V"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "stored", "of raw"):
        table.add_column(name, justify="right")
    for info in sessions:
        table.add_row(info.name, _codec(info), f"{info.length:,}", _bytes(info.stored_bytes), _share(info))
    Console().print(table)


def print_session(info: SessionInfo) -> None:
    shape = info.shape
    rows = {
        "session": info.name,
        "generation": info.generation,
        "tokens": f"{info.length:,} (exact below {min(info.exact_end, info.length):,})",
        "model": shape.model_fingerprint or "-",
        "shape": f"{shape.layers} layers, {shape.kv_heads} KV heads, {shape.query_heads} query heads, "
        f"head_dim {shape.head_dim}, {shape.dtype}",
        "codec": info.codec_json,
        "fitted": "yes" if info.fitted else "not yet: all tokens are exact",
        "calibrated": "-" if info.max_position is None else f"below position {info.max_position:,}",
        "stored": f"{_bytes(info.stored_bytes)}, {_share(info)} of {_bytes(info.raw_bytes)}",
        "forked": "-" if info.forked_from is None else f"from {info.forked_from} at {info.forked_at:,}",
        "expires": "never" if info.ttl_seconds is None else f"after {info.ttl_seconds:g} s unused",
        "pinned": "yes" if info.pinned else "no",
    }
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _codec(info: SessionInfo) -> str:
    return f"{_one(info.codec.keys)} / {_one(info.codec.values)}"


def _one(codec: object) -> str:
    rate = getattr(codec, "planes", None) or getattr(codec, "bits", None)
    name = str(getattr(codec, "name", ""))
    return name if rate is None else f"{name} {rate}"


def _share(info: SessionInfo) -> str:
    """Stored bytes over what the session's own tokens take raw; a fork's shared tokens are its parent's."""
    own = info.raw_bytes * (1 - (info.forked_at or 0) / info.length) if info.length else 0.0
    return f"{info.stored_bytes / own:.3f}" if own else "-"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
