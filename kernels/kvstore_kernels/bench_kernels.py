"""`kvstore bench kernels`: the CUDA ops beside this run's copy bandwidth and exact fp16 torch.

Each op runs on several sets of data in turn, together more than the L2 holds, from one CUDA graph; a time is the median
of 30 replays over the number of ops in the graph. A byte counts once where an op must read or write it. Ratios to a
bandwidth are the op's bytes a second over the copy's; ratios to a named peer are the peer's time over the op's.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvstore_kernels.bench_authors import Authors, NotBuiltError
from kvstore_kernels.cuda import attend, decode, encode, pack_page, score, topk
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, Pages, SignPages, page_bytes
from kvstore_kernels.measurement import Measurement
from kvstore_kernels.types import Expansion, HeadEncoder, SignEncoder, SignLayout, Signs

DEVICE = torch.device("cuda", 0)
REPLAYS = 30
ROTATED_BYTES = 400_000_000
SETS_MOST = 8
HEADS = 8


def median_us(ops: Sequence[Callable[[], object]], *, captured: bool = True) -> float:
    """Microseconds of one of `ops`, run one after another, from a CUDA graph if `captured`."""
    for op in ops:
        op()
    torch.cuda.synchronize()
    run = _capture(ops) if captured else lambda: [op() for op in ops]
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(ops))
    return statistics.median(times[3:])


def _capture(ops: Sequence[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [op() for op in ops]
    return lambda: (graph.replay(), results)


def sketch(tokens: int, head_dim: int, rows: int, heads: int, query_bits: int, *, values: bool) -> SignPages:
    """Random sketches of one group on pages in random order."""
    layout = SignLayout(head_dim, 1, ((0,) * (rows // 32),) * heads)
    matrix = tuple(torch.randn(rows, head_dim) for _ in range(heads))
    noise = (torch.full((rows,), 0.363),) * heads
    expansion = Expansion(layout, matrix, noise, torch.randn(heads, head_dim), query_bits)
    pages = -(-tokens // PAGE_TOKENS)
    slab = torch.empty(pages * page_bytes(layout), dtype=torch.uint8, device=DEVICE)
    table = (torch.randperm(pages, device=DEVICE) * (page_bytes(layout) // PAGE_UNIT)).int()
    where = Pages(slab, table, 0, tokens)
    words = torch.randint(-(2**31), 2**31 - 1, (tokens, layout.words), device=DEVICE).int()
    scales = (torch.rand(tokens, layout.scales, device=DEVICE) * 0.02 + 0.01).half()
    pack_page.pack_page(Signs(words, scales), layout, where, values=values)
    return SignPages(where, expansion)


def sets_of(bytes_each: int) -> int:
    return min(SETS_MOST, max(2, ROTATED_BYTES // bytes_each))


class Bench:
    """Measurements as they are made, printed at once."""

    def __init__(self, only: str) -> None:
        self.only, self.found, self.copy = only, list[Measurement](), 0.0

    def add(
        self, name: str, shape: str, microseconds: float, moved: int = 0, peer: str = "", peer_us: float = 0.0
    ) -> float:
        """Once against the copy bandwidth if it `moved` bytes, once against a peer if there is one."""
        if moved and self.copy:
            ratio = moved / microseconds / 1e6 / self.copy
            self._show(Measurement(name, shape, microseconds, "us", ratio, "copy bandwidth"))
        if peer or not (moved and self.copy):
            ratio = peer_us / microseconds if peer else None
            self._show(Measurement(name, shape, microseconds, "us", ratio, peer))
        return microseconds

    def _show(self, each: Measurement) -> None:
        self.found.append(each)
        ratio = "" if each.ratio is None else f"{each.ratio:7.2f} of {each.peer}"
        print(f"{each.name:32} {each.shape:36} {each.value:10.1f} us {ratio}", flush=True)


def bench_copy(bench: Bench) -> None:
    source = torch.randn(2**29, device=DEVICE)
    target = torch.empty_like(source)
    microseconds = median_us([lambda: target.copy_(source)], captured=False)
    bench.copy = 2 * source.nbytes / microseconds / 1e6
    bench.found.append(Measurement("device copy", "2 GiB, read and written", bench.copy, "TB/s"))
    print(f"device copy: {bench.copy:.2f} TB/s", flush=True)


def exact_peers(tokens: int) -> Iterator[tuple[str, float]]:
    """Microseconds of exact fp16 torch: scores, then attention by each SDPA backend that runs."""
    count = sets_of(tokens * HEADS * 512)
    keys = [torch.randn(1, HEADS, tokens, 128, dtype=torch.float16, device=DEVICE) for _ in range(count)]
    values = [torch.randn(1, HEADS, tokens, 128, dtype=torch.float16, device=DEVICE) for _ in range(count)]
    q = torch.randn(1, HEADS * 4, 1, 128, dtype=torch.float16, device=DEVICE)
    rows = q.view(1, HEADS, 4, 128)
    yield "matmul", median_us([lambda k=k: rows @ k.transpose(2, 3) for k in keys])
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            ops = [
                lambda k=k, v=v: scaled_dot_product_attention(q, k, v, enable_gqa=True)
                for k, v in zip(keys, values, strict=True)
            ]
            yield name, median_us(ops)


def copy_us(moved: int) -> float:
    """Microseconds of a plain copy that moves as many bytes, half of them read, half written."""
    pairs = [torch.randint(256, (2, moved // 2), dtype=torch.uint8, device=DEVICE) for _ in range(sets_of(moved))]
    return median_us([lambda p=p: p[1].copy_(p[0]) for p in pairs])


def bench_attention(bench: Bench, tokens: int) -> None:
    """Scores, top-k and attention at the shape of the bars, one query token and eight workers' at once."""
    peers = dict(exact_peers(tokens))
    torch.cuda.empty_cache()
    shape = f"{tokens:,} x 8 heads x 256 bits"
    for name, peer_us in peers.items():
        bench.add(f"exact fp16 {name}", f"{tokens:,} x 8 heads x 128", peer_us)
    stored = tokens * HEADS * 34
    for name, moved in (("score", stored + tokens * HEADS * 8), ("attend", 2 * stored)):
        bench.add(f"copy of as many bytes as {name}", shape, copy_us(moved), moved)
    for bits in (8, 12):
        keys = [sketch(tokens, 128, 256, HEADS, bits, values=False) for _ in range(sets_of(stored))]
        values = [sketch(tokens, 128, 256, HEADS, bits, values=True) for _ in range(sets_of(stored))]
        alone = dict[str, float]()
        for workers in (1, 8):
            q = torch.randn(workers, HEADS * 4, 128, dtype=torch.float16, device=DEVICE)
            label = f"{bits} planes" + (f", {workers} workers" if workers > 1 else "")
            scored = median_us([lambda k=k, q=q: score.score(q, k, sm_scale=0.088, dtype=torch.float16) for k in keys])
            moved = stored + tokens * HEADS * 8 * workers
            bench.add(f"score, {label}", shape, scored, moved, "exact fp16 matmul", peers["matmul"] * workers)
            attended = median_us(
                [
                    lambda k=k, v=v, q=q: attend.attend(q, k, v, sm_scale=0.088)
                    for k, v in zip(keys, values, strict=True)
                ]
            )
            bench.add(f"attend, {label}", shape, attended, 2 * stored, "exact fp16 cudnn", peers["cudnn"] * workers)
            if workers > 1:
                bench.add(f"attend, {label}", shape, attended, 0, "one worker's bar of 3", 3 * alone["attend"])
            else:
                alone = {"attend": attended, "score": scored}
                best = median_us([lambda k=k, q=q: topk.best(q, k, 256, sm_scale=0.088) for k in keys])
                bench.add(f"top-k of 256, {label}", shape, best, 0, "score", scored)
        del keys, values
        torch.cuda.empty_cache()


def bench_shapes(bench: Bench, tokens: int = 262_144) -> None:
    """Other widths, bits and group sizes, each against the copy bandwidth."""
    for head_dim, rows, group in (
        (64, 128, 4), (96, 192, 4), (128, 128, 4), (128, 384, 4), (128, 512, 4), (256, 512, 4),
        (128, 256, 1), (128, 256, 3), (128, 256, 7), (128, 256, 8), (128, 256, 16),
    ):  # fmt: skip
        for count in (tokens, tokens - 101):
            stored = count * HEADS * (rows // 8 + 2)
            sets = sets_of(stored)
            keys = [sketch(count, head_dim, rows, HEADS, 8, values=False) for _ in range(sets)]
            values = [sketch(count, head_dim, rows, HEADS, 8, values=True) for _ in range(sets)]
            q = torch.randn(1, HEADS * group, head_dim, dtype=torch.float16, device=DEVICE)
            shape = f"{count:,} x 8 x {rows} bits, d {head_dim}, group {group}"
            attended = median_us(
                [lambda k=k, v=v, q=q: attend.attend(q, k, v, sm_scale=0.1) for k, v in zip(keys, values, strict=True)]
            )
            bench.add("attend", shape, attended, 2 * stored)
            del keys, values
        torch.cuda.empty_cache()


def qjl_encoder() -> tuple[SignEncoder, Expansion]:
    """Of 256 random directions, the same for all heads."""
    layout = SignLayout(128, 1, ((0,) * 8,) * HEADS)
    blocks = torch.cat([torch.linalg.qr(torch.randn(128, 128))[0] * 128**0.5 for _ in range(2)])
    head = HeadEncoder(
        blocks, torch.ones(256, dtype=torch.int32), torch.ones(256), torch.arange(256, dtype=torch.int32),
        torch.zeros(256, dtype=torch.int32), torch.ones(256),
    )  # fmt: skip
    encoder = SignEncoder(layout, (head,) * HEADS, torch.randn(HEADS, 128), torch.ones(1, 128))
    return encoder, Expansion(layout, (blocks / 256,) * HEADS, (torch.ones(256),) * HEADS, torch.randn(HEADS, 128), 8)


def bench_vectors(bench: Bench, tokens: int = 131_072) -> None:
    """Encoding keys and values from fp16, and decoding a sketch to it."""
    encoder, expansion = qjl_encoder()
    shape = f"{tokens:,} x 8 heads x 128, 256 bits"
    size, stored = tokens * HEADS * 256, tokens * HEADS * 34
    x = [torch.randn(tokens, HEADS, 128, device=DEVICE).half() for _ in range(4)]
    pairs = [lambda k=k, v=v: encode.launch_pair(k, v, encoder, encoder) for k, v in (x[:2], x[2:])]
    bench.add("encode keys and values", shape, median_us(pairs), 2 * (size + stored))
    signs = [encode.launch(each, encoder)[0] for each in x[:2]]
    decoded = median_us([lambda s=s: decode.decode(s, expansion, torch.float16) for s in signs])
    bench.add("decode to fp16", shape, decoded, size)


def bench_authors(bench: Bench, checkout: Path, tokens: int = 131_072) -> None:
    """Our score and encode as the QJL authors' kernels would have them: keys alone, 256 bits, one scale."""
    try:
        authors = Authors(checkout)
    except NotBuiltError as error:
        bench.found.append(Measurement("the QJL authors' kernels", str(error), 0.0, "not built"))
        print(f"the QJL authors' kernels are not built: {error}", flush=True)
        return
    shape = f"{tokens:,} x 8 heads x 256 bits"
    vectors = torch.randn(tokens, HEADS, 128, device=DEVICE).half()
    theirs = [authors.score(vectors, 4), authors.quantise(vectors)]
    scored, quantised = (median_us([op], captured=False) for op in theirs)
    keys = [sketch(tokens, 128, 256, HEADS, 8, values=False) for _ in range(sets_of(tokens * HEADS * 34))]
    q = torch.randn(1, HEADS * 4, 128, dtype=torch.float16, device=DEVICE)
    ours = median_us([lambda k=k: score.score(q, k, sm_scale=0.088) for k in keys])
    encoder = qjl_encoder()[0]
    encoded = median_us([lambda: encode.launch(vectors, encoder)])
    bench.add("the QJL authors' score", shape, scored)
    bench.add("score, 8 planes, float32", shape, ours, 0, "the QJL authors' score", scored)
    bench.add("the QJL authors' quantiser", shape, quantised)
    bench.add("encode keys", shape, encoded, 0, "the QJL authors' quantiser", quantised)


def run(only: str = "", qjl_checkout: Path | None = None) -> tuple[str, list[Measurement]]:
    """The device's name, and the measurements in the order in which they were made."""
    bench = Bench(only)
    bench_copy(bench)
    groups: dict[str, Callable[[], None]] = {
        "attention 131072": lambda: bench_attention(bench, 131_072),
        "attention 1048576": lambda: bench_attention(bench, 1_048_576),
        "vectors": lambda: bench_vectors(bench),
        "shapes": lambda: bench_shapes(bench),
    }
    if qjl_checkout is not None:
        groups["authors"] = lambda: bench_authors(bench, qjl_checkout)
    for name, measure in groups.items():
        if only in name:
            measure()
    return torch.cuda.get_device_name(DEVICE), bench.found
