"""What a codec costs, in bits per number; `python -m kvstore_codecs.describe` prints the tables of docs/codecs.md."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvstore_codecs.plan import CodecPlan, SignPlan
from kvstore_codecs.planes import plane_code
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import DTYPE_BYTES, KINDS, Affine, CodecSpec, ModelShape, Qjl, Raw, Rotated
from kvstore_kernels.types import STEP, WORD_ROWS

_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Bits:
    """Stored bits per number (one channel of one vector) of tokens that are not exact, averaged over layers."""

    code: float
    scales: float

    @property
    def total(self) -> float:
        return self.code + self.scales


def describe(plan: CodecPlan) -> dict[str, Bits]:
    """Bits of `keys`, `values` and `both`."""
    numbers = plan.shape.layers * plan.shape.kv_heads * plan.shape.head_dim
    dense = 8 * DTYPE_BYTES[plan.shape.dtype] * numbers / plan.shape.layers
    found = {}
    for kind in KINDS:
        code = scales = 0.0
        for kind_plan in (plan.of(layer, kind) for layer in range(plan.shape.layers)):
            widths = kind_plan.widths
            if widths is None:
                code += dense
            elif isinstance(kind_plan, SignPlan):
                code += WORD_ROWS * widths.words
                scales += 16 * widths.scales
            else:
                code += 16 * widths.scales
        found[kind] = Bits(code / numbers, scales / numbers)
    keys, values = found["keys"], found["values"]
    return {**found, "both": Bits((keys.code + values.code) / 2, (keys.scales + values.scales) / 2)}


def bits_table() -> Iterator[str]:
    """Markdown: code and scale bits of each codec by head_dim, and the code bits that its levels read."""
    yield "| codec | " + " | ".join(f"d = {d}: code + scales | levels read" for d in _HEAD_DIMS) + " |"
    yield "| --- |" + " --- | --- |" * len(_HEAD_DIMS)
    rotated = {f"`rotated`, {b} plane{'s' * (b > 1)}": Rotated(planes=b) for b in range(1, 7)}
    affine = {f"`affine`, {b} planes": Affine(planes=b) for b in (2, 4)}
    outliers = Qjl(outlier_channels=tuple(range(8)))
    qjl = {"`qjl`, 256 rows": Qjl(), "`qjl`, 256 rows and 64 for outliers": outliers, "`qjl`, 512 rows": Qjl(bits=512)}
    for name, codec in {"`raw`, fp16": Raw(), **qjl, **rotated, **affine}.items():
        yield f"| {name} | " + " | ".join(_cells(codec, d) for d in _HEAD_DIMS) + " |"


def plane_table() -> Iterator[str]:
    """Markdown: the weights and errors of sign planes of a unit normal coordinate, by stored and read planes."""
    yield "| stored | step | read | weights, most significant plane first | mean square error |"
    yield "| --- | --- | --- | --- | --- |"
    for stored in STEP:
        for read in range(stored, 0, -1):
            code = plane_code(stored, read)
            weights = ", ".join(f"{weight:.4f}" for weight in code.weights)
            yield f"| {stored} | {STEP[stored] if stored > 1 else '–'} | {read} | {weights} | {code.mse:.5f} |"


def _cells(codec: Raw | Qjl | Rotated | Affine, head_dim: int) -> str:
    shape = ModelShape(layers=1, kv_heads=1, query_heads=1, head_dim=head_dim, dtype="float16", sm_scale=1.0)
    plan = plan_for(CodecSpec(keys=codec, values=codec, mean="none"), shape, None)
    bits, kind_plan = describe(plan)["keys"], plan.of(0, "keys")
    levels = "16"
    if isinstance(kind_plan, SignPlan):
        levels = ", ".join(f"{WORD_ROWS * level.read_words(0) / head_dim:g}" for level in kind_plan.levels)
    return f"{bits.code:g} + {bits.scales:g} | {levels}"


if __name__ == "__main__":
    print("\n".join([*bits_table(), "", *plane_table()]))
