"""The status page: one HTML document that says everything without a script; with one it stays up to date."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from html import escape
from math import isnan

from kvstore_server.metadata.index import ReplicaEntry
from kvstore_server.monitoring.history import History, Moment, percentile

REFRESH_SECONDS = 10
SCRIPT = """
setInterval(async () => {
  try {
    const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
    document.querySelector("main").replaceWith(page.querySelector("main"));
    document.body.classList.remove("stale");
  } catch { document.body.classList.add("stale"); }
}, 2000);
"""
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:0;color:#1a2330;background:#f6f7f9}
main{max-width:72em;margin:auto;padding:1.2em}h1{font-size:1.35em;margin:.2em 0}h2{font-size:1.05em;margin:1.6em 0 .4em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11em,1fr));gap:.8em;margin-top:1em}
.tile,table{background:#fff;border:1px solid #dde2e8;border-radius:6px}.tile{padding:.7em .9em}
.tile b{font-size:1.5em;display:block}svg{width:100%;height:36px;display:block}
polyline{fill:none;stroke:#2f6fde;stroke-width:1.5;vector-effect:non-scaling-stroke}
table{border-collapse:collapse;width:100%}th,td{padding:.3em .8em;text-align:right;border-top:1px solid #edf0f3}
th{border-top:0;color:#5a6675;font-weight:600}th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
.bad{color:#c0281c}.stale main{opacity:.45}p{margin:.2em 0;color:#5a6675}
@media (prefers-color-scheme:dark){body{background:#14181d;color:#dfe5ec}
.tile,table{background:#1d232a;border-color:#2c343d}
th,td{border-color:#2c343d}p,th{color:#93a0ae}polyline{stroke:#6ea0ff}.bad{color:#ff8073}}
"""
POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    f"frame-ancestors 'none'; script-src 'sha256-{b64encode(sha256(SCRIPT.encode()).digest()).decode()}'"
)
"""The Content-Security-Policy under which the page works."""


@dataclass(frozen=True)
class Session:
    """One of the largest."""

    name: str
    tokens: int
    stored_bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class Replica:
    """What does not change while a server runs."""

    version: str
    address: str
    device: str
    store: str
    index: str
    started_unix_seconds: float


def render(
    replica: Replica,
    state: str,
    history: History,
    sessions: Sequence[Session] = (),
    replicas: Sequence[ReplicaEntry] = (),
) -> str:
    """The page of one replica; `state` is what its health says, `sessions` the largest ones, largest first."""
    now = history.moments[-1]
    up = now.unix_seconds - replica.started_unix_seconds
    when = datetime.fromtimestamp(now.unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        f"<h1>kvstore {escape(replica.version)} on {escape(replica.device)}: "
        f'<span class="{"" if state == "serving" else "bad"}">{escape(state)}</span></h1>',
        f"<p>{escape(replica.address)} · store {escape(replica.store)} · index {escape(replica.index)} · "
        f"up {_duration(up)} · as of {when}</p>",
        _tiles(history),
        _table("Replicas", ("", "state", "device", "version", "seen"), (_replica(each, now) for each in replicas)),
        _table("Calls", ("", "total", "a second", "p50 ms", "p99 ms", "errors"), _calls(history)),
        _table("Errors", ("", "calls", "Attend steps"), _errors(now)),
        _table("Tiers", ("", "sessions", "bytes", "of raw"), _tiers(now)),
        _table("Codecs", ("", "tokens", "stored", "of raw", "error", "top-k recall"), _codecs(now)),
        _table("Largest sessions", ("", "tokens", "stored", "of raw"), map(_session, sessions)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>kvstore</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f'<noscript><meta http-equiv="refresh" content="{REFRESH_SECONDS}"></noscript></head>'
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>"
    )


def _tiles(history: History) -> str:
    steps, calls = history.rates("kvstore_attend_steps_total"), history.rates("grpc_server_handled_total")
    good_steps, good_calls = (
        history.rates("kvstore_attend_steps_total", code="OK"),
        history.rates("grpc_server_handled_total", grpc_code="OK"),
    )
    failed = [
        max(0.0, round(all_calls + all_steps - ok_calls - ok_steps, 6))
        for all_calls, all_steps, ok_calls, ok_steps in zip(calls, steps, good_calls, good_steps, strict=True)
    ]
    p50, p99 = (
        [1e3 * value for value in history.percentiles("kvstore_attend_step_seconds", share)] for share in (0.5, 0.99)
    )
    tiles = {
        "Attend steps a second": steps,
        "calls a second": calls,
        "step p50, ms": p50,
        "step p99, ms": p99,
        "errors a second": failed,
    }
    return '<div class="tiles">' + "".join(_tile(name, values) for name, values in tiles.items()) + "</div>"


def _tile(name: str, values: Sequence[float]) -> str:
    latest = values[-1] if values else float("nan")
    return f'<div class="tile">{name}<b>{_number(latest)}</b>{sparkline(values)}</div>'


def sparkline(values: Sequence[float]) -> str:
    """An SVG line from zero to the highest value; a gap where there is none."""
    highest = max((value for value in values if not isnan(value)), default=0.0) or 1.0
    lines, points = list[str](), list[str]()
    for number, value in enumerate([*values, float("nan")]):
        if not isnan(value):
            points.append(f"{number},{30 * (1 - value / highest):.1f}")
        elif points:
            lines.append(f'<polyline points="{" ".join(points)}"/>')
            points = []
    return f'<svg viewBox="0 -2 {max(1, len(values) - 1)} 34" preserveAspectRatio="none">{"".join(lines)}</svg>'


def _calls(history: History) -> Iterable[tuple[str, ...]]:
    now, before = history.moments[-1], history.moments[-2] if len(history.moments) > 1 else None
    for method in sorted({labels["grpc_method"] for labels, _ in now.each("grpc_server_handled_total")}):
        name = "grpc_server_handled_total"
        total = now.total(name, grpc_method=method)
        rates = history.rates(name, grpc_method=method)
        errors = total - now.total(name, grpc_method=method, grpc_code="OK")
        halves = (
            percentile(before, now, "grpc_server_handling_seconds", share, grpc_method=method) for share in (0.5, 0.99)
        )
        latencies = (_number(1e3 * value) for value in halves)
        yield method, _number(total), _number(rates[-1] if rates else 0.0), *latencies, _number(errors)


def _errors(now: Moment) -> Iterable[tuple[str, ...]]:
    calls = ("grpc_server_handled_total", "grpc_code")
    steps = ("kvstore_attend_steps_total", "code")
    codes = {labels[label] for name, label in (calls, steps) for labels, value in now.each(name) if value} - {"OK"}
    for code in sorted(codes):
        yield code, *(_number(now.total(name, **{label: code})) for name, label in (calls, steps))


def _tiers(now: Moment) -> Iterable[tuple[str, ...]]:
    stored, raw = now.total("kvstore_stored_bytes"), now.total("kvstore_raw_bytes")
    yield "store", _number(now.total("kvstore_sessions")), _bytes(stored), _ratio(stored, raw)
    for tier, prefix in (("host memory", "kvstore_resident"), ("device memory", "kvstore_device")):
        yield tier, _number(now.total(f"{prefix}_sessions")), _bytes(now.total(f"{prefix}_bytes")), ""


def _codecs(now: Moment) -> Iterable[tuple[str, ...]]:
    for labels, tokens in sorted(now.each("kvstore_appended_tokens_total"), key=lambda each: each[0]["codec"]):
        codec = labels["codec"]
        stored, raw = (now.total(f"kvstore_appended_{what}_bytes_total", codec=codec) for what in ("stored", "raw"))
        means = (_mean(now, name, codec) for name in ("kvstore_quality_relative_error", "kvstore_quality_top_k_recall"))
        yield codec, _number(tokens), _bytes(stored), _ratio(stored, raw), *means


def _replica(replica: ReplicaEntry, now: Moment) -> tuple[str, ...]:
    seen = max(0.0, now.unix_seconds - replica.seen_unix_seconds)
    return replica.name, replica.state, replica.device, replica.version, f"{seen:.0f} s ago"


def _session(session: Session) -> tuple[str, ...]:
    ratio = _ratio(session.stored_bytes, session.raw_bytes)
    return session.name, _number(session.tokens), _bytes(session.stored_bytes), ratio


def _mean(now: Moment, name: str, codec: str) -> str:
    count = now.total(f"{name}_count", codec=codec)
    return f"{now.total(f'{name}_sum', codec=codec) / count:.4f}" if count else "–"


def _table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    body = body or '<tr><td colspan="9">none</td></tr>'
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _number(value: float) -> str:
    if isnan(value):
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.3g}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _ratio(stored: float, raw: float) -> str:
    return f"{stored / raw:.3f}" if raw else "–"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{minutes} min" if hours < 2 else f"{hours} h" if hours < 48 else f"{hours // 24} days"
