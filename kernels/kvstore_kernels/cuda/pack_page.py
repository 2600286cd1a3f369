"""Token-major sketches into device pages."""

from collections.abc import Iterator

from kvstore_kernels import build
from kvstore_kernels.cuda.pages import PAGE_TOKENS, Pages, key_blocks
from kvstore_kernels.types import SignLayout, Signs

TILE_WORDS = 32


def macros(values: bool) -> build.Macros:
    return {"VALUES": int(values)}


def variants() -> Iterator[build.Variant]:
    for values in (False, True):
        yield "pack_page", macros(values), 0


def pack_page(signs: Signs, layout: SignLayout, pages: Pages, *, values: bool, keep: bool = False) -> None:
    """Writes `signs` as rows [pages.first, pages.end) of keys, or of values, whose bits are kept by channel.

    In the first page the rows below pages.first stay as they are with `keep`; every other row outside becomes zero.
    """
    rows = pages.end - pages.first
    if [*signs.words.shape] != [rows, layout.words] or [*signs.scales.shape] != [rows, layout.scales]:
        raise ValueError(
            f"words {[*signs.words.shape]} and scales {[*signs.scales.shape]} for {rows} rows "
            f"of {layout.words} words and {layout.scales} scales"
        )
    if not rows or not layout.words:
        return
    blocks = key_blocks(layout, pages.slab.device)
    touched = -(-pages.end // PAGE_TOKENS) - pages.first // PAGE_TOKENS
    build.kernel("pack_page", pages.slab.device, macros(values)).launch(
        (touched, -(-layout.words // TILE_WORDS), 1), 256, 0, signs.words.contiguous(), signs.scales.contiguous(),
        pages.slab, pages.table, blocks[0], blocks[1], pages.first, pages.end, layout.words, layout.scales, int(keep),
    )  # fmt: skip
