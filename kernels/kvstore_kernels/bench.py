"""The CPU's ops beside plain torch on float32, in one run: `python -m kvstore_kernels.bench [--json FILE]`.

A time is the median of rounds in which op and peer take turns; a ratio is the op's time over the peer's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvstore_kernels.backend import Backend, cpu_backend
from kvstore_kernels.types import DenseRows, Expansion, HeadEncoder, SignEncoder, SignLayout, SignRows, plane_weights

Call = Callable[[], object]

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
CODED_TOKENS = 1024
CODED_SHAPES = {"30 layers of 3 x 64": (30, 3, 64), "32 layers of 8 x 128": (32, 8, 128)}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    shape: str
    ms: float
    peer: str
    ratio: float


def run(json_path: Path | None = None, tokens: int = 32768, rounds: int = 15) -> list[Row]:
    """Prints the table as it grows; also writes it to `json_path` if given."""
    facts = {"device": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'op':<32}{'shape':<44}{'ms':>9}{'ratio':>7}  peer")
    rows = []
    backend = cpu_backend()
    for row in chain(_attention(backend, tokens, rounds), _coding(backend, min(tokens, CODED_TOKENS), rounds)):
        print(f"{row.name:<32}{row.shape:<44}{row.ms:9.2f}{row.ratio:7.2f}  {row.peer}", flush=True)
        rows.append(row)
    if json_path is not None:
        json_path.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return rows


def _attention(backend: Backend, tokens: int, rounds: int) -> Iterator[Row]:
    keys, values = torch.randn(2, tokens, KV_HEADS, HEAD_DIM)
    heads = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
    kinds = {
        "256 bits": [_sketch(backend, x, 2) for x in (keys, values)],
        "512 bits": [_sketch(backend, x, 4) for x in (keys, values)],
        "raw bfloat16": [DenseRows(x.bfloat16()) for x in (keys, values)],
        "raw float32": [DenseRows(x) for x in (keys, values)],
    }
    for workers in (1, 8):
        q = torch.randn(workers, KV_HEADS * GROUP, HEAD_DIM)
        shape = f"{workers} x {q.shape[1]} queries, {tokens} x {KV_HEADS} x {HEAD_DIM}"
        exact = min((partial(_sdpa, q, *heads), partial(_matmul_attention, q, *heads)), key=_median_ms)
        for kind, (k, v) in kinds.items():
            op = partial(backend.attend, q, k, v, sm_scale=HEAD_DIM**-0.5)
            yield _row(f"attend {kind}", shape, op, "exact float32 attention", exact, rounds)
            op = partial(backend.score, q, k, sm_scale=HEAD_DIM**-0.5)
            yield _row(f"score {kind}", shape, op, "exact float32 scores", partial(_matmul_scores, q, heads[0]), rounds)


def _coding(backend: Backend, tokens: int, rounds: int) -> Iterator[Row]:
    """One layer and kind; the name tells the tokens a second of a whole model, keys and values."""
    for model, (layers, heads, head_dim) in CODED_SHAPES.items():
        x, shape = torch.randn(tokens, heads, head_dim), f"{tokens} x {heads} x {head_dim}, 4 planes"
        encoder, expansion = _code(heads, head_dim, 4)
        rows = SignRows(backend.encode(x, encoder), expansion)
        matrix, signs = encoder.heads[0].projection, torch.randn(tokens, heads, 4 * head_dim).sign()
        for name, op, peer, product in (
            ("encode", partial(backend.encode, x, encoder), "float32 projection", partial(torch.matmul, x, matrix.T)),
            (
                "decode",
                partial(backend.decode, rows),
                "float32 E^T t",
                partial(torch.matmul, signs, expansion.matrix[0]),
            ),
        ):
            row = _row(name, shape, op, peer, product, rounds)
            print(f"{name}, {model}: {tokens / row.ms * 1e3 / layers / 2:,.0f} tokens/s")
            yield row


def _code(heads: int, head_dim: int, planes: int) -> tuple[SignEncoder, Expansion]:
    """A random rotation with additive sign planes."""
    rotation = torch.linalg.qr(torch.randn(head_dim, head_dim)).Q
    weights = torch.tensor(plane_weights(planes)).repeat_interleave(head_dim)
    layout = SignLayout(head_dim, 1, ((0,) * (planes * head_dim // 32),) * heads)
    head = HeadEncoder(
        projection=rotation,
        depth=torch.full((head_dim,), planes, dtype=torch.int32),
        sigma=torch.ones(head_dim),
        row_coordinate=torch.arange(head_dim, dtype=torch.int32).repeat(planes),
        row_shift=torch.arange(planes - 1, -1, -1, dtype=torch.int32).repeat_interleave(head_dim),
        row_weight=weights,
    )
    mean = torch.zeros(heads, head_dim)
    matrix = weights.unsqueeze(1) * rotation.repeat(planes, 1)
    expansion = Expansion(layout, (matrix,) * heads, (torch.ones(len(matrix)),) * heads, mean, 12)
    return SignEncoder(layout, (head,) * heads, mean, torch.ones(1, head_dim)), expansion


def _sketch(backend: Backend, x: Tensor, planes: int) -> SignRows:
    encoder, expansion = _code(KV_HEADS, HEAD_DIM, planes)
    return SignRows(backend.encode(x, encoder), expansion)


def _row(name: str, shape: str, op: Call, peer: str, peer_op: Call, rounds: int) -> Row:
    times = [(_ms(peer_op), _ms(op)) for _ in range(rounds + 2)][2:]
    peer_ms, ms = (statistics.median(column) for column in zip(*times, strict=True))
    return Row(name, shape, ms, f"{peer} {peer_ms:.2f} ms", ms / peer_ms)


def _ms(op: Call) -> float:
    start = time.perf_counter()
    op()
    return (time.perf_counter() - start) * 1e3


def _median_ms(op: Call) -> float:
    return statistics.median(_ms(op) for _ in range(5))


def _sdpa(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(q.transpose(0, 1)[None], keys[None], values[None], enable_gqa=True)


def _matmul_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(_matmul_scores(q, keys), 2) @ values


def _matmul_scores(q: Tensor, keys: Tensor) -> Tensor:
    rows = q.unflatten(1, (keys.shape[0], -1)).transpose(0, 1).flatten(1, 2)
    return (rows * HEAD_DIM**-0.5) @ keys.mT


def _processor() -> str:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    parser.add_argument("--tokens", type=int, default=32768, help="stored tokens of the attention rows")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    run(arguments.json, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
