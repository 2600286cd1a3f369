"""`kvstore`: the server and what an operator or a newcomer does with it."""

import asyncio
import logging
import os
import signal
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from kvstore_server.commands.arguments import (
    TARGET,
    CountOption,
    DeviceOption,
    LengthOption,
    ModelOption,
    SkipOption,
    TargetOption,
    TextOption,
    client_of,
    explained,
)
from kvstore_server.commands.keys import keys
from kvstore_server.commands.loadtest import loadtest
from kvstore_server.commands.sessions import sessions
from kvstore_server.commands.size import size
from kvstore_server.commands.training import search, train

if TYPE_CHECKING:
    from kvstore_kernels.measurement import Measurement

CaOption = Annotated[Path | None, typer.Option(help="Who signs for it, if it has TLS", envvar="KVSTORE_TLS_CA_FILE")]
ServerNameOption = Annotated[str | None, typer.Option(help="In its certificate", envvar="KVSTORE_TLS_SERVER_NAME")]

PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""Rows join those in memory faster: one thread alone takes 0.4 ms to pin a MB."""
POLLING = "-event_engine_listener"
"""Of gRPC's experiments: whoever waits for a message reads it, instead of being woken by a thread that has read it."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold a key
    help="A remote compressed-KV store that can be queried.",
)
app.add_typer(keys, name="keys")
app.add_typer(sessions, name="sessions")
projections = typer.Typer(no_args_is_help=True, help="Fitted bases for one model (extra `train`).")
projections.command()(train)
projections.command()(search)
app.add_typer(projections, name="projections")
bench = typer.Typer(no_args_is_help=True, help="Measurements, each with a peer or ceiling in the same run.")
app.add_typer(bench, name="bench")
app.command()(loadtest)
app.command()(size)


def main() -> None:
    """Runs the command line; what a server refuses is one line and exit code 1."""
    try:
        app()
    except Exception as error:
        from kvstore_client import KVStoreError  # imports torch, which probes and --help need not wait for

        if not isinstance(error, KVStoreError):
            raise
        Console(stderr=True).print(f"[red]{error.code}[/]: {escape(error.args[0])}", highlight=False)
        sys.exit(1)


@app.command()
def version() -> None:
    """Print the installed version."""
    print(installed_version("remote-kv-store"))


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings (docs: deploy/kvstore.yaml)")] = None,
    data: Annotated[str | None, typer.Option(help="The store: a local folder, or s3://bucket/path")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port; port 0 takes a free one")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N")] = None,
    index: Annotated[str | None, typer.Option(help="memory or redis://host:port/db")] = None,
    insecure: Annotated[bool, typer.Option(help="Allow an address that other machines reach")] = False,
    metrics: Annotated[str | None, typer.Option(help="host:port of /metrics, or `off`")] = None,
) -> None:
    """Run a server until SIGTERM, then drain."""
    for number in (signal.SIGTERM, signal.SIGINT):  # until it serves there is nothing to drain
        signal.signal(number, lambda *_: os._exit(0))
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # read when torch is imported, which is below
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", PINNING)
    os.environ.setdefault("GRPC_EXPERIMENTS", POLLING)  # read when grpc is first used
    import uvloop  # answers more calls a second than asyncio's own loop

    from kvstore_server.app import redactor
    from kvstore_server.app import serve as run
    from kvstore_server.config import ConfigError, load
    from kvstore_server.device import DeviceUnusable
    from kvstore_server.log import configure

    given: dict[str, dict[str, Any]] = {
        "storage": {"url": data},
        "listen": {"address": listen, "insecure": insecure or None, "metrics_address": metrics},
        "device": {"name": device},
        "index": {"url": index},
    }
    overrides = {name: {k: v for k, v in section.items() if v is not None} for name, section in given.items()}
    if metrics == "off":
        overrides["listen"]["metrics_address"] = None
    try:
        settings = load(config, {name: section for name, section in overrides.items() if section})
        configure(settings.log, redactor(settings))
    except ConfigError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None
    try:
        code = uvloop.run(run(settings))
    except Exception as error:
        expected = isinstance(error, DeviceUnusable)  # the text says it all
        logging.getLogger(__name__).critical("the server stops: %s", error, exc_info=None if expected else error)
        code = 1
    raise typer.Exit(code)


@app.command()
def health(
    target: TargetOption = TARGET,
    timeout_seconds: float = 5.0,
    ca_file: Annotated[
        Path | None, typer.Option(help="Who signed it, if it has TLS", envvar="KVSTORE_TLS_CA_FILE")
    ] = None,
    server_name: Annotated[str | None, typer.Option(help="It is called", envvar="KVSTORE_TLS_SERVER_NAME")] = None,
) -> None:
    """Exit 0 if a server is SERVING: for probes."""
    from kvstore_server.rpc.probe import is_serving

    if not is_serving(target, timeout_seconds, ca_file and ca_file.read_bytes(), server_name):
        raise typer.Exit(1)


@app.command()
def info(target: TargetOption = TARGET) -> None:
    """What a server is and what it allows."""
    from kvstore_server.report import print_info

    with client_of(target) as client:
        print_info(client.server_info())


@app.command()
def verify(
    data: Annotated[str, typer.Argument(help="The store: a local folder, or s3://bucket/path")],
    endpoint: Annotated[str | None, typer.Option(help="The URL of the bucket's service")] = None,
) -> None:
    """Check every object of a store: exit 1 and the damaged ranges if there are any."""
    from pydantic import ValidationError

    from kvstore_server.config import Storage
    from kvstore_server.storage.opening import open_store
    from kvstore_server.storage.verify import verify_store

    try:
        settings = Storage(url=data, endpoint=endpoint)
    except ValidationError as error:
        raise typer.BadParameter(error.errors()[0]["msg"]) from None
    if settings.kind == "local" and not settings.folder.is_dir():
        raise typer.BadParameter(f"{data} is not a folder")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying")
        report = verify_store(
            open_store(settings),
            lambda r: progress.update(task, completed=r.sessions, total=r.sessions_total),
        )
    for damaged in report.damaged:
        print(damaged)
    print(
        f"{report.sessions} sessions, {report.records} records, {report.segments} segments, {report.bytes:,} bytes: "
        f"{len(report.damaged) or 'nothing'} damaged"
    )
    if report.damaged:
        raise typer.Exit(1)


@app.command("rebuild-index")
def rebuild_index(
    config: Annotated[Path | None, typer.Option(help="The servers' YAML file of settings")] = None,
    data: Annotated[str | None, typer.Option(help="The store: a local folder, or s3://bucket/path")] = None,
    index: Annotated[str | None, typer.Option(help="redis://host:port/db")] = None,
) -> None:
    """Empty the index that servers share and fill it from the store; they may go on meanwhile."""
    from kvstore_server.app import open_index
    from kvstore_server.config import ConfigError, load
    from kvstore_server.errors import KVStoreError
    from kvstore_server.sessions.rebuild import rebuild_from_nothing
    from kvstore_server.storage.opening import open_store

    given = {"storage": data, "index": index}
    try:
        settings = load(config, {name: {"url": url} for name, url in given.items() if url is not None})
        if settings.index.url == "memory":
            raise ConfigError("index.url: an index in memory is filled whenever its server starts")
        with Console(stderr=True).status("rebuilding") as status:
            found = asyncio.run(
                rebuild_from_nothing(
                    open_store(settings.storage),
                    open_index(settings.index),
                    lambda count: status.update(f"{count} sessions"),
                )
            )
    except (ConfigError, KVStoreError) as error:
        Console(stderr=True).print(str(error), style="red", highlight=False)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    print(f"{found} sessions")


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(help="Another text than docstrings of the standard library")] = None,
) -> None:
    """One long context on a real model: read once, shared by two workers, continued after a kill -9."""
    from kvstore_client.demo.main import run

    raise typer.Exit(run(text))


@bench.command("ops")
def bench_ops(json: Annotated[Path | None, typer.Option(help="Write the table as JSON too")] = None) -> None:
    """The ops on this machine's CPU beside exact float32 attention by torch."""
    from kvstore_kernels.bench import run

    run(json)


@bench.command("service")
def bench_service(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N")] = "auto",
    tokens: Annotated[int, typer.Option(min=1024, help="Length of the shared session")] = 131_072,
    layers: Annotated[int, typer.Option(min=1, help="Layers that are appended and fetched")] = 2,
    seconds: Annotated[float, typer.Option(help="Of each load")] = 4.0,
    json: Annotated[Path | None, typer.Option(help="Write the measurements as JSON too")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the ratios too (needs matplotlib)")] = None,
) -> None:
    """A server of its own on loopback beside a plain echo of the same sizes."""
    from kvstore_client.bench.service import Plan, run

    plan = Plan(device, tokens, layers, min(16_384, tokens), seconds)
    _report("service", *run(plan, Console()), json, png)


@bench.command("kernels")
def bench_kernels(
    json: Annotated[Path | None, typer.Option(help="Write the measurements as JSON too")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the ratios too (needs matplotlib)")] = None,
    only: Annotated[str, typer.Option(help="Only groups whose name has this word")] = "",
    qjl_checkout: Annotated[
        Path | None, typer.Option(help="Checkout of the QJL authors' repository, built here")
    ] = None,
) -> None:
    """The CUDA ops beside this run's copy bandwidth, exact fp16 torch and the QJL authors' kernels."""
    from kvstore_kernels.bench_kernels import run

    _report("kernels", *run(only, qjl_checkout), json, png)


def _report(name: str, device: str, measurements: "list[Measurement]", json: Path | None, png: Path | None) -> None:
    from kvstore_kernels.measurement import table_of, write_chart, write_json

    title = f"{name} on {device}"
    Console().print(table_of(title, measurements))
    if json is not None:
        write_json(json, device, measurements)
    if png is not None:
        write_chart(png, title, measurements)


@bench.command("quality")
def bench_quality(
    text: TextOption,
    row: Annotated[list[str] | None, typer.Option(help="Such as keys:matryoshka:2, repeatable")] = None,
    projection: Annotated[
        list[str] | None, typer.Option(help="FILE, or NAME=FILE, for fitted codecs; repeatable")
    ] = None,
    model: ModelOption = "smollm2",
    length: LengthOption = 1024,
    count: CountOption = 4,
    skip: SkipOption = 0,
    from_token: Annotated[int, typer.Option(min=0, help="Measure from this token of each sequence on")] = 0,
    direct: Annotated[bool, typer.Option("--direct", help="By the ops alone, without a server")] = False,
    device: DeviceOption = "cpu",
    needles: Annotated[int, typer.Option(min=0, help="Facts planted at every depth and length")] = 0,
    needle_length: Annotated[list[int] | None, typer.Option(min=512, help="Tokens, repeatable")] = None,
    needle_row: Annotated[list[str] | None, typer.Option(help="Rows asked for facts; as --row")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the planted facts")] = 0,
    table: Annotated[
        list[Path] | None, typer.Option(help="JSON of such a run, whose rows are taken over; repeatable", exists=True)
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write what was found as JSON too")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw KL by bits as PNG (extra `bench`)")] = None,
) -> None:
    """What codecs cost a model: perplexity, KL and agreement of the next token, facts found, beside the exact model."""
    with explained():
        from kvstore_client.projections.commands import Wanted, quality
        from kvstore_client.projections.rows import DEFAULT

        rows = row or (() if table else DEFAULT)
        wanted = Wanted(
            model=model,
            text=text,
            rows=rows,
            projections=dict(map(_named_file, projection or ())),
            length=length,
            count=count,
            skip=skip,
            from_token=from_token,
            direct=direct,
            device=device,
            needles=needles,
            needle_lengths=needle_length or (length,),
            needle_rows=needle_row or rows,
            seed=seed,
            tables=table or (),
        )
        quality(wanted, json, plot)


def _named_file(text: str) -> tuple[str, Path]:
    """NAME=FILE; a file without a name has its own."""
    name, equals, file = text.rpartition("=")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file} is no file")
    return name if equals else path.stem, path


@projections.command("fit")
def fit_projection(
    text: TextOption,
    out: Annotated[Path, typer.Option(help="The file to write")],
    model: ModelOption = "smollm2",
    metric: Annotated[str, typer.Option(help="output, query or none")] = "output",
    length: LengthOption = 1024,
    count: CountOption = 8,
    skip: SkipOption = 0,
    max_position: Annotated[int | None, typer.Option(help="Positions it is for, at most --length")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Fit bases to a model's keys and values over a text, in closed form."""
    if metric not in ("output", "query", "none"):
        raise typer.BadParameter(f"{metric} is not output, query or none")
    with explained():
        from kvstore_client.projections.commands import fit

        at = {"length": length, "count": count, "skip": skip, "max_position": max_position}
        fit(model, text, out, metric=metric, device=device, **at)


@projections.command()
def push(file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], target: TargetOption = TARGET) -> None:
    """Store a projection on a server; prints its sha256."""
    with client_of(target) as client:
        print(client.put_projection(file.read_bytes()))


@projections.command("list")
def list_projections(target: TargetOption = TARGET) -> None:
    """The projections that a server keeps."""
    with client_of(target) as client:
        for each in client.list_projections():
            print(f"{each.sha256} {each.size_bytes:>13,} bytes  {each.model_fingerprint}")


@projections.command("show")
def show_projection(file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    """What a projection file is."""
    from kvstore_client.projections.show import show

    with explained():
        show(file)


if __name__ == "__main__":
    main()
