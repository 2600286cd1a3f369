"""Small sessions and appends for storage tests."""

import hashlib

import torch

from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import CodecSpec, ModelShape, Rotated
from kvstore_codecs.transform import Basis
from kvstore_kernels.types import Signs, as_torch_dtype
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.segment import Segment
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import Buffer, ObjectStore

TENANT = "default"
SHAPE = ModelShape(layers=2, kv_heads=1, query_heads=2, head_dim=32, dtype="float16", sm_scale=0.25)
SPEC = CodecSpec(keys=Rotated(planes=1), values=Rotated(planes=1), sink_tokens=1)
OTHER_SPEC = CodecSpec(keys=Rotated(planes=2), values=Rotated(planes=1), sink_tokens=1)
CLOCK_SECONDS = 1_790_000_000.5


def commit_log(store: ObjectStore) -> CommitLog:
    return CommitLog(store, TENANT, lambda: CLOCK_SECONDS)


def kind_rows(
    shape: ModelShape, tokens: int, exact: int, widths: tuple[int, int] | None, source: torch.Generator
) -> KindRows:
    """Random rows of one layer and kind; dense without widths."""
    count = tokens if widths is None else exact
    rows = torch.randn(count, shape.kv_heads, shape.head_dim, generator=source).to(as_torch_dtype(shape.dtype))
    if widths is None:
        return KindRows(rows, None)
    words = torch.randint(-(2**31), 2**31, (tokens - exact, widths[0]), dtype=torch.int32, generator=source)
    return KindRows(rows, Signs(words, torch.rand(tokens - exact, widths[1], generator=source).half()))


def random_fit(shape: ModelShape, seed: int = 0, bases: tuple[int, int] = (0, 0)) -> Fit:
    """With bases of so many layers of keys and of values."""
    source = torch.Generator().manual_seed(seed)
    heads = (shape.kv_heads, shape.head_dim)
    means = torch.randn(2, shape.layers, *heads, generator=source)
    made = [
        Basis(
            torch.randn(count, *heads, shape.head_dim, generator=source).half(),
            torch.rand(count, *heads, generator=source),
        )
        if count
        else None
        for count in bases
    ]
    return Fit(means[0], means[1], 1, 9, *made)


def next_segment(
    log: CommitLog,
    state: SessionState,
    tokens: int = 1,
    *,
    exact: int = 0,
    seed: int = 0,
    widths: tuple[int, int] | None = (1, 1),
    fit: Fit | None = None,
    epoch: int = 0,
    block_hashes: tuple[bytes, ...] = (),
    block_tokens: int = 0,
    start: int | None = None,
    after: tuple[int, str] | None = None,
) -> Segment:
    """The next append of `state`: layer 0 dense, all others signs. Equal seeds give equal digests."""
    source = torch.Generator().manual_seed(seed)
    layers = [
        [
            kind_rows(state.shape, tokens, exact, widths if layer else None, source)
            for layer in range(state.shape.layers)
        ]
        for _ in range(2)
    ]
    return log.segment(
        state,
        tokens=tokens,
        exact=exact,
        digest=hashlib.sha256(f"{seed} {tokens}".encode()).hexdigest(),
        encoding="raw",
        encoded_by="server",
        keys=tuple(layers[0]),
        values=tuple(layers[1]),
        fit=fit,
        epoch=epoch,
        block_hashes=block_hashes,
        block_tokens=block_tokens,
        start=start,
        after=after,
    )


def append(log: CommitLog, state: SessionState, tokens: int = 1, seed: int = 0) -> Committed | AlreadyPresent:
    return log.commit(state, next_segment(log, state, tokens, seed=seed))


def created(log: CommitLog, name: str = "a", spec: CodecSpec = SPEC) -> SessionState:
    return log.create(name, SHAPE, spec)[0]


def loaded(log: CommitLog, name: str = "a") -> SessionState:
    state = log.load(name)
    assert state
    log.appends(state)
    return state


def three_appends(log: CommitLog) -> SessionState:
    state = created(log)
    for seed in range(3):
        append(log, state, 2, seed=seed)
    return state


def log_key(start: int, name: str = "a", generation: int = 0) -> str:
    return f"default/{name}/{generation:012d}/log/{start:012d}.safetensors"


def object_bytes(parts: list[Buffer]) -> bytes:
    return b"".join(parts)


def assert_equal_rows(one: Segment, other: Segment) -> None:
    for kind in ("keys", "values"):
        for layer in range(one.header.geometry.layers):
            first, second = one.of(layer, kind), other.of(layer, kind)
            assert torch.equal(first.rows, second.rows)
            assert (first.signs is None) == (second.signs is None)
            if first.signs and second.signs:
                assert torch.equal(first.signs.words, second.signs.words)
                assert torch.equal(first.signs.scales, second.signs.scales)
