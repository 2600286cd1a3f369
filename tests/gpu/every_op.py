"""Runs every kernel on small inputs, for test_sanitizer: `python -m tests.gpu.every_op [bug]`."""

import sys

import torch

from kvstore_kernels import build
from kvstore_kernels.cuda import attend, decode, dense, encode, score, score_at, topk
from kvstore_kernels.types import AffineEncoder, SignLayout
from tests.gpu.inputs import DEVICE, EXPANSIONS, device_signs, on_pages
from tests.kernels.inputs import normal, sign_encoder, sign_rows

BUGS = {
    "memcheck": 'extern "C" __global__ void bug(int* x) { x[1 << 20] = 1; }',
    "racecheck": """extern "C" __global__ void bug(int* x) {
        __shared__ int y[64];
        y[threadIdx.x] = x[0];
        x[threadIdx.x] = y[63 - threadIdx.x];
    }""",
}


def run_bug(source: str) -> None:
    """A kernel that the sanitizer's tool must complain of."""
    import cupy  # pyright: ignore[reportMissingImports]

    kernel = cupy.RawModule(code=source).get_function("bug")
    kernel((1,), (64,), (cupy.zeros(64, dtype=cupy.int32),))


def run_signs(name: str, tokens: int) -> None:
    by = EXPANSIONS[name]
    rows, q = sign_rows(tokens, by), normal(5, by.layout.heads * 2, by.layout.head_dim).to(DEVICE)
    keys, values = (on_pages(rows, values=kind, first=3) for kind in (False, True))
    scores = score.score(q, keys, sm_scale=0.1, dtype=torch.float16)
    positions, _ = topk.topk(scores, 50)
    topk.best(q, keys, 50, sm_scale=0.1)
    score_at.score_at(q, keys, positions, sm_scale=0.1)
    for queries in (q[:2], q, q.repeat(2, 1, 1)):
        attend.attend(queries, keys, values, sm_scale=0.1, logit_soft_cap=30.0, debias=0.5)
    decode.decode(device_signs(rows.signs), by, torch.float16)


def run_vectors() -> None:
    q, keys, values = (normal(n, heads, 96).half().to(DEVICE) for n, heads in ((3, 6), (397, 2), (397, 2)))
    dense.score(q, keys, sm_scale=0.1)
    dense.attend(q, keys, values, sm_scale=0.1, logit_soft_cap=30.0)
    x = normal(77, 2, 128).half().to(DEVICE)
    for planes in (1, 2):
        encode.encode(x, sign_encoder(128, planes))
    layout = SignLayout(128, 4, ((0, 1, 2, 3) * 2,) * 2, has_offsets=True)
    encode.encode(x, AffineEncoder(layout, 2, torch.zeros(2, 128)))


def run_all() -> None:
    for name in ("qjl", "ragged groups"):
        run_signs(name, 397)
    run_signs("qjl", 2900)  # in more than one split
    topk.topk(normal(1, 2, 20_003).to(DEVICE), 100)
    topk.topk(torch.zeros(1, 2, 20_003, device=DEVICE), 100)
    run_vectors()


def main() -> None:
    if len(sys.argv) > 1:
        run_bug(BUGS[sys.argv[1]])
    else:
        names, kernel = set[str](), build.kernel

        def noted(name: str, *args, **kwargs) -> build.Kernel:
            names.add(name)
            return kernel(name, *args, **kwargs)

        build.kernel = noted
        run_all()
        build._compiled.cache_clear()
        build.has_warpgroups = lambda _: False  # as on a device before Hopper
        run_all()
        if left_out := {path.stem for path in build.CSRC.glob("*.cu")} - names:
            sys.exit(f"these kernels were not run: {', '.join(sorted(left_out))}")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
