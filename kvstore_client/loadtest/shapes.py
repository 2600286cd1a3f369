"""Model shapes by name, for load without a model."""

from kvstore_codecs.spec import ModelShape


def _shape(layers: int, kv_heads: int, query_heads: int, head_dim: int) -> ModelShape:
    return ModelShape(
        layers=layers,
        kv_heads=kv_heads,
        query_heads=query_heads,
        head_dim=head_dim,
        dtype="bfloat16",
        sm_scale=head_dim**-0.5,
        model_fingerprint="loadtest",
    )


SHAPES = {
    "smollm2-135m": _shape(30, 3, 9, 64),
    "llama-3.1-8b": _shape(32, 8, 32, 128),
    "qwen3-30b-a3b": _shape(48, 4, 32, 128),
}
