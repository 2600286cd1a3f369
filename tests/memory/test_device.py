import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvstore_codecs.resolve import plan_for
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import CodecSpec, Kind, LayerOverride, ModelShape, Raw, Rotated
from kvstore_kernels import DenseRows, SignRows, Signs
from kvstore_kernels.cuda.pages import SignPages
from kvstore_server.errors import ResourceExhausted
from kvstore_server.memory.device import DeviceMemory
from kvstore_server.memory.resident import Block, Epoch, ResidentSession
from tests.memory.fake_paging import FakePaging, rows_of

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=4, head_dim=64, dtype="float16", sm_scale=0.125)
SPEC = CodecSpec(keys=Rotated(planes=4), values=Rotated(planes=4), mean="none")
SINKS = SPEC.sink_tokens
LEVELS: dict[Kind, int] = {"keys": 0, "values": 0}
MIB = 1 << 20
EXTENT = 2 * MIB


def session(tokens: int, spec: CodecSpec = SPEC) -> ResidentSession:
    resident = ResidentSession(SHAPE)
    resident.adopt([Epoch(SINKS, plan_for(spec, SHAPE, None))])
    grow(resident, tokens)
    return resident


def grow(resident: ResidentSession, tokens: int) -> None:
    """Random rows of any content; the device does not look into them."""
    exact = max(0, min(tokens, SINKS - resident.length))
    layers = []
    for layer in range(SHAPE.layers):
        pair = []
        for kind in ("keys", "values"):
            plan = resident.plan_of(layer, kind, resident.epoch_of(resident.length))
            layout = getattr(plan, "layout", None)
            rows = torch.randn(tokens if layout is None else exact, SHAPE.kv_heads, SHAPE.head_dim).half()
            signs = None
            if layout is not None:
                words = torch.randint(-(2**31), 2**31 - 1, (tokens - exact, layout.words)).int()
                signs = Signs(words, torch.rand(tokens - exact, layout.scales).half())
            pair.append(KindRows(rows, signs))
        layers.append((pair[0], pair[1]))
    assert resident.extend(resident.length, layers, tokens)


def memory(size_bytes: int = 64 * MIB, staging_bytes: int = 8 * MIB) -> tuple[DeviceMemory, FakePaging]:
    paging = FakePaging()
    return DeviceMemory(paging, size_bytes, staging_bytes), paging


def check(device: DeviceMemory, resident: ResidentSession, end: int, layer: int = 1, start: int = 0) -> list[Block]:
    """The device's rows are the host's, bit for bit."""
    blocks = device.blocks(resident, layer, start, end, LEVELS)
    expected = list(resident.blocks(layer, start, end, LEVELS))
    assert [(block.start, block.end) for block in blocks] == [(block.start, block.end) for block in expected]
    for block, host in zip(blocks, expected, strict=True):
        for found, wanted in ((block.keys, host.keys), (block.values, host.values)):
            if isinstance(wanted, DenseRows):
                assert isinstance(found, DenseRows)
                assert torch.equal(found.data, wanted.data)
            else:
                assert isinstance(wanted, SignRows)
                assert isinstance(found, SignPages | SignRows)
                signs = rows_of(found) if isinstance(found, SignPages) else found.signs
                assert torch.equal(signs.words, wanted.signs.words)
                assert torch.equal(signs.scales, wanted.signs.scales)
    return blocks


@pytest.mark.parametrize("end", [1, 3, 4, 5, 255, 256, 257, 511, 512, 513, 700])
def test_the_device_holds_what_the_host_holds(end: int) -> None:
    resident = session(700)
    check(memory()[0], resident, end)


def test_a_range_inside_pages_is_read_from_them() -> None:
    resident, (device, _) = session(700), memory()
    for start, end in ((0, 700), (2, 5), (300, 301), (256, 512), (4, 260)):
        check(device, resident, end, start=start)


def test_one_token_appends_reach_the_device_and_are_brought_once() -> None:
    resident, (device, paging) = session(250), memory()
    for _ in range(20):
        check(device, resident, resident.length)
        grow(resident, 1)
    check(device, resident, resident.length)
    assert paging.packed_rows == 2 * (resident.length - SINKS)


def test_before_the_fit_all_rows_are_exact_and_afterwards_stay() -> None:
    resident, (device, _) = ResidentSession(SHAPE), memory()
    rows = torch.randn(100, SHAPE.kv_heads, SHAPE.head_dim).half()
    resident.extend(0, [(KindRows(rows, None), KindRows(rows, None))] * SHAPE.layers, 100)
    check(device, resident, 100)
    resident.adopt([Epoch(100, plan_for(SPEC, SHAPE, None))])
    grow(resident, 300)
    check(device, resident, 400)


def test_raw_layers_grow_in_place_of_pages() -> None:
    spec = SPEC.model_copy(update={"overrides": (LayerOverride(layers=(1,), keys=Raw(), values=Raw()),)})
    resident, (device, _) = session(300, spec), memory()
    for _ in range(5):
        check(device, resident, resident.length, layer=0)
        grow(resident, 700)
        check(device, resident, resident.length, layer=1)


def test_sketched_values_beside_raw_keys_come_as_rows() -> None:
    spec = SPEC.model_copy(update={"keys": Raw()})
    resident, (device, _) = session(300, spec), memory()
    block = check(device, resident, 300)[-1]
    assert isinstance(block.values, SignRows)


@pytest.mark.parametrize("call", range(4))
def test_rows_that_could_not_be_brought_are_brought_by_the_next_query(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """As when the device has no memory left for a copy of them. Both kinds are uploaded and packed."""
    resident, (device, paging), calls = session(300), memory(), list[int]()
    check(device, resident, 300)
    grow(resident, 400)

    def fails_once(do: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call + 1:
                raise torch.OutOfMemoryError
            return do(*args, **kwargs)

        return done

    for name in ("upload", "pack"):
        monkeypatch.setattr(paging, name, fails_once(getattr(paging, name)))
    with pytest.raises(torch.OutOfMemoryError):
        check(device, resident, 700)
    check(device, resident, 700)
    check(device, resident, 300)


def test_the_least_recently_used_session_leaves_for_a_new_one() -> None:
    one, two, three = session(3000), session(3000), session(3000)
    device, paging = memory(size_bytes=2 * EXTENT)
    for resident in (one, two, one, three):
        check(device, resident, 3000)
    assert device.counts["evicted"] == 1
    before = paging.packed_rows
    check(device, one, 3000)
    assert paging.packed_rows == before
    check(device, two, 3000)
    assert device.counts["evicted"] == 2


def test_first_loads_are_those_for_which_nothing_left() -> None:
    one, two, three = session(3000), session(3000), session(3000)
    device, _ = memory(size_bytes=2 * EXTENT)
    for end in (2000, 2000, 3000):
        check(device, one, end)
    assert device.first_loads == 1
    check(device, one, 3000, layer=0)
    check(device, two, 3000)
    assert device.first_loads == 3
    check(device, three, 3000)
    assert device.counts["evicted"] == 1
    assert device.first_loads == 3


def test_a_session_larger_than_the_device_is_streamed_layer_by_layer() -> None:
    resident = session(6000)
    device, paging = memory(size_bytes=EXTENT)
    for layer in (0, 0, 1, 0):
        check(device, resident, 6000, layer)
    assert device.counts["streamed_layers"] == 3
    assert paging.packed_rows == 3 * 2 * (6000 - SINKS)
    small = session(100)
    check(device, small, 100)
    check(device, resident, 6000, 1)


def test_a_layer_larger_than_staging_is_refused_with_the_limit_and_others_go_on() -> None:
    device, _ = memory(size_bytes=EXTENT, staging_bytes=4 * EXTENT)
    with pytest.raises(ResourceExhausted) as refused:
        device.blocks(session(200_000), 0, 0, 200_000, LEVELS)
    assert refused.value.facts["limit"] == str(4 * EXTENT)
    check(device, session(500), 500)


def test_a_session_that_the_host_dropped_gives_its_pages_back() -> None:
    device, _ = memory()
    resident = session(600)
    device.prefetch(resident, 0, 600)
    gone = weakref.ref(resident)
    assert device.used_bytes
    del resident
    gc.collect()
    assert gone() is None
    check(device, session(5), 5)
    assert device.sessions == 1


def forked(parent: ResidentSession, end: int) -> ResidentSession:
    child = ResidentSession(SHAPE)
    child.adopt([epoch for epoch in parent.epochs if epoch.start < end])
    child.parent, child.shared_end = weakref.ref(parent), end
    for _, first, last in parent.sketched_ranges(0, end):
        begin = child.length  # exact rows come with the first sketches
        rows = []
        for layer in range(SHAPE.layers):
            pair = [
                KindRows(
                    parent.exact_rows(layer, kind, begin, min(SINKS, first)), parent.signs(layer, kind, first, last)
                )
                for kind in ("keys", "values")
            ]
            rows.append((pair[0], pair[1]))
        child.extend(begin, rows, last - begin)
    return child


def test_a_fork_shares_full_pages_and_neither_sees_the_others_appends() -> None:
    parent, (device, paging) = session(1000), memory()
    check(device, parent, 1000, 0)
    check(device, parent, 1000, 1)
    child = forked(parent, 700)
    before = paging.packed_rows
    check(device, child, 700, 0)
    assert device.counts["shared_pages"] == 2 * SHAPE.layers * 2
    assert paging.packed_rows - before == 2 * (700 - 512)
    grow(child, 400)
    grow(parent, 400)
    for resident in (child, parent, child):
        check(device, resident, resident.length, 0)
        check(device, resident, resident.length, 1)


def with_epochs(tokens: int) -> ResidentSession:
    """Sketches of four planes, then of two from position 300 on, then of three from position 900 on."""
    resident = session(min(tokens, 300))
    for planes, start, end in ((2, 300, 900), (3, 900, tokens)):
        spec = CodecSpec(keys=Rotated(planes=planes), values=Rotated(planes=planes), mean="none")
        resident.adopt([*resident.epochs, Epoch(start, plan_for(spec, SHAPE, None))])
        grow(resident, min(tokens, end) - start)
    return resident


@pytest.mark.parametrize("end", [299, 300, 301, 512, 899, 901, 1100])
def test_every_epoch_has_pages_of_its_own(end: int) -> None:
    resident, (device, paging) = with_epochs(1100), memory()
    for first, last in ((0, end), (0, 1100), (280, min(end + 1, 1100))):
        check(device, resident, last, start=first)
    assert paging.packed_rows == 2 * (1100 - SINKS)
    grow(resident, 100)
    check(device, resident, 1200)


def test_a_fork_shares_full_pages_of_every_epoch() -> None:
    parent, (device, paging) = with_epochs(1700), memory()
    check(device, parent, 1700)
    child = forked(parent, 1600)
    before = paging.packed_rows
    check(device, child, 1600)
    # Of two kinds: pages 0; 1 and 2 of epoch 1, the first and the last of which others have parts of; 3 to 5.
    assert device.counts["shared_pages"] == 2 * (1 + 2 + 3)
    assert paging.packed_rows - before == 2 * ((300 - 256) + (900 - 768) + (1600 - 1536))
    grow(child, 400)
    grow(parent, 400)
    for resident in (child, parent):
        check(device, resident, resident.length)


def test_epochs_are_streamed_too() -> None:
    resident = with_epochs(9000)
    device, _ = memory(size_bytes=EXTENT)
    for layer in (0, 1):
        check(device, resident, 9000, layer)
    assert device.counts["streamed_layers"] == 2


def test_shared_pages_outlive_the_parent() -> None:
    parent, (device, _) = session(1000), memory()
    check(device, parent, 1000)
    child = forked(parent, 1000)
    check(device, child, 1000)
    del parent
    gc.collect()
    grown = [session(1000) for _ in range(4)]
    for resident in [child, *grown, child]:
        check(device, resident, 1000)


def test_no_row_of_an_earlier_session_is_left_in_a_page() -> None:
    device, _ = memory(size_bytes=2 * EXTENT)
    first = session(512)
    check(device, first, 512)
    del first
    gc.collect()
    second = session(300)
    block = check(device, second, 300)[-1]
    assert isinstance(block.keys, SignPages)
    pages = block.keys.pages
    whole = rows_of(SignPages(type(pages)(pages.slab, pages.table, 0, 512), block.keys.expansion))
    assert not whole.words[:SINKS].any()
    assert not whole.words[300:].any()
    assert not whole.scales[300:].any()
