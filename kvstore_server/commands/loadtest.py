"""`kvstore loadtest`: its arguments."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore_server.commands.arguments import TARGET


def loadtest(
    target: Annotated[str, typer.Option(help="host:port, or several with commas", envvar="KVSTORE_TARGET")] = TARGET,
    scenario: Annotated[
        str, typer.Option(help="ingest, decode, private, retrieval, mixed, failover (starts its own servers) or trace")
    ] = "decode",
    workers: Annotated[int, typer.Option(min=1, max=1000, help="Connections")] = 8,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that the workers are spread over")] = 1,
    rate: Annotated[float, typer.Option(help="Requests a second, all workers together, Poisson")] = 50.0,
    duration: Annotated[float, typer.Option(help="Seconds")] = 10.0,
    model: Annotated[str, typer.Option(help="Such as llama-3.1-8b, or 32x8x32x128[:float16]")] = "smollm2-135m",
    codec: Annotated[str, typer.Option(help="Such as raw, rotated:4, qjl:256/affine:4; else the server's")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Length of each session that is queried")] = 4096,
    append_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one append")] = 256,
    top_k: Annotated[int, typer.Option(min=1, help="Of scenarios that ask for it")] = 64,
    trace: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="In Mooncake's format")] = None,
    trace_speed: Annotated[float, typer.Option(help="How much faster than recorded")] = 1.0,
    trace_block: Annotated[int, typer.Option(min=1, help="Tokens that stand for a block of 512")] = 512,
    seed: int = 0,
    slo: Annotated[list[str] | None, typer.Option(help="p99=20ms, repeatable: sets the exit code")] = None,
    find_capacity: Annotated[bool, typer.Option(help="Search the highest rate that keeps every --slo")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result as JSON")] = None,
    hdr: Annotated[Path | None, typer.Option(help="Write an HdrHistogram log")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw latency over time")] = None,
    html: Annotated[Path | None, typer.Option(help="Write table and picture as one page")] = None,
) -> None:
    """Requests at a rate that does not wait for answers; every answer is checked, latency counts from the due time."""
    fields = {
        "targets": tuple(target.split(",")),
        "scenario": "trace" if trace is not None and scenario == "decode" else scenario,
        "model": model,
        "codec": codec,
        "tokens": tokens,
        "append_tokens": append_tokens,
        "top_k": top_k,
        "workers": workers,
        "processes": processes,
        "rate": rate,
        "seconds": duration,
        "trace": trace,
        "trace_speed": trace_speed,
        "trace_block_tokens": trace_block,
        "seed": seed,
    }
    files = {"json": json, "hdr": hdr, "png": png, "html": html}
    raise typer.Exit(_exit_code(fields, slo or [], find_capacity, files))


def _exit_code(fields: dict[str, Any], slo: list[str], find_capacity: bool, files: dict[str, Path | None]) -> int:
    try:
        import hdrh  # noqa: F401
    except ModuleNotFoundError:
        raise typer.BadParameter("hdrhistogram is not installed: pip install 'remote-kv-store[loadtest]'") from None
    from kvstore_client.demo.messages import Unusable
    from kvstore_client.demo.processes import WorkerFailed
    from kvstore_client.loadtest.load import Load
    from kvstore_client.loadtest.main import Files, run
    from kvstore_client.loadtest.sessions import WrongAnswers
    from kvstore_client.loadtest.slo import Slo

    try:
        load, slos = Load(**fields), [Slo.parse(text) for text in slo]
        if find_capacity and not slos:
            raise ValueError("--find-capacity searches the highest rate within --slo, which is missing")
        if find_capacity and load.trace is not None:
            raise ValueError("--find-capacity sets the rate, and so does a trace")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        return run(load, slos, find_capacity=find_capacity, files=Files(**files))
    except (WorkerFailed, WrongAnswers, Unusable) as error:
        typer.echo(f"load test: {error}", err=True)
        return 1
