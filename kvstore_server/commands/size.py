"""`kvstore size`: what sessions take, before there are any."""

from typing import Annotated

import typer

SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def size(
    model: Annotated[str, typer.Option(help="Such as llama-3.1-8b, or 32x8x32x128[:float16]")] = "llama-3.1-8b",
    codec: Annotated[
        list[str] | None, typer.Option(help="raw, rotated:4, qjl:256/affine:4, ... or JSON; repeatable")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of one session")] = 131_072,
    memory: Annotated[str, typer.Option(help="Of all servers' devices or hosts, as in 64GiB")] = "64GiB",
) -> None:
    """Bytes of a token and of a session, and how many sessions a memory holds, by codec."""
    from rich.console import Console
    from rich.table import Table

    from kvstore_codecs.named import SHAPES, codec_named, shape_named
    from kvstore_codecs.size import DEFAULT_CODECS, bytes_per_token, session_bytes

    try:
        shape, memory_bytes = shape_named(model), parse_bytes(memory)
        specs = {text: codec_named(text) for text in codec or DEFAULT_CODECS}
        rows = [
            (text, bytes_per_token(spec, shape), session_bytes(spec, shape, tokens)) for text, spec in specs.items()
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    title = f"{model}: {shape.layers} layers, {shape.kv_heads} KV heads, head_dim {shape.head_dim}, {shape.dtype}"
    table = Table(title=title, caption=None if model in SHAPES else f"names: {', '.join(SHAPES)}")
    for name in ("codec", "bytes a token", "of raw", f"{tokens:,} tokens", f"sessions in {memory}"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    for text, token, whole in rows:
        ratio = f"{token / shape.raw_bytes_per_token:.4f}"
        table.add_row(text, f"{token:,.0f}", ratio, f"{whole / 2**30:,.3f} GiB", f"{memory_bytes // whole:,.0f}")
    Console().print(table)


def parse_bytes(text: str) -> int:
    """`64GiB` in bytes; ValueError for anything else."""
    for unit, factor in SIZE_UNITS.items():
        number = text.removesuffix(unit)
        if number != text and number.strip().isdigit():
            return int(number) * factor
    raise ValueError(f"{text!r} is not a size such as 64GiB ({', '.join(SIZE_UNITS)})")
