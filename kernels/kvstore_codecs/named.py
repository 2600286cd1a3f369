"""Model shapes and codecs by short names, as command lines take them."""

import re

from kvstore_codecs.spec import (
    BASIS_FIT_TOKENS_MIN,
    DEFAULT,
    Affine,
    AnyCodec,
    CodecSpec,
    Fitted,
    Matryoshka,
    ModelShape,
    Projected,
    Qjl,
    Raw,
    Rotated,
)

NUMBERS = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?::(float16|bfloat16|float32))?", re.ASCII)
CODECS: dict[str, tuple[type[AnyCodec], str]] = {
    "raw": (Raw, ""),
    "qjl": (Qjl, "bits"),
    "rotated": (Rotated, "planes"),
    "affine": (Affine, "planes"),
    "matryoshka": (Matryoshka, "bits"),
    "projected": (Projected, "share"),
}
"""Each codec's class, and which of its settings may follow the name."""


def _shape(layers: int, kv_heads: int, query_heads: int, head_dim: int, dtype: str = "bfloat16") -> ModelShape:
    shape = {"layers": layers, "kv_heads": kv_heads, "query_heads": query_heads, "head_dim": head_dim, "dtype": dtype}
    return ModelShape.model_validate({**shape, "sm_scale": head_dim**-0.5})


SHAPES = {
    "smollm2-135m": _shape(30, 3, 9, 64),
    "llama-3.1-8b": _shape(32, 8, 32, 128),
    "llama-3.1-70b": _shape(80, 8, 64, 128),
    "qwen3-30b-a3b": _shape(48, 4, 32, 128),
}


def shape_named(text: str) -> ModelShape:
    """A name in SHAPES, or layers x KV heads x query heads x head_dim as in 32x8x32x128 or 32x8x32x128:float16.

    ValueError if it is neither, or is no shape.
    """
    if (shape := SHAPES.get(text)) is not None:
        return shape
    if (match := NUMBERS.fullmatch(text)) is None:
        raise ValueError(f"model {text!r} is not one of {', '.join(SHAPES)} and not as 32x8x32x128[:float16]")
    *numbers, dtype = match.groups()
    return _shape(*map(int, numbers), dtype=dtype or "bfloat16")


def codec_named(text: str) -> CodecSpec:
    """`default`, a codec for keys and values as in `rotated:4`, one for each as in `rotated:4/affine:2`, or JSON.

    ValueError if it is none of them.
    """
    if text == "default":
        return DEFAULT
    if text.startswith("{"):
        return CodecSpec.model_validate_json(text)
    first, _, second = text.partition("/")
    keys, values = _codec(first), _codec(second or first)
    if isinstance(keys, Fitted) or isinstance(values, Fitted):
        return CodecSpec(keys=keys, values=values, fit_tokens=BASIS_FIT_TOKENS_MIN)
    return CodecSpec(keys=keys, values=values)


def _codec(text: str) -> AnyCodec:
    name, _, value = text.partition(":")
    made, setting = CODECS.get(name, (None, ""))
    if made is None or (value and not setting):
        raise ValueError(f"codec {text!r} is not one of {', '.join(CODECS)}, with a rate as in rotated:4")
    return made.model_validate({setting: value} if value else {})


def name_of(spec: CodecSpec) -> str:
    """What `codec_named` would read, without the settings that have no short form."""
    keys, values = (_name(codec) for codec in (spec.keys, spec.values))
    text = keys if keys == values else f"{keys}/{values}"
    return text + f", {len(spec.overrides)} overrides" * bool(spec.overrides)


def _name(codec: AnyCodec) -> str:
    setting = CODECS[codec.name][1]
    return f"{codec.name}:{getattr(codec, setting):g}" if setting else codec.name
