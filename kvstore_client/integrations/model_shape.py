"""What the store must know of a transformers model: its attention shape and a name for its weights."""

import hashlib
import json
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvstore_codecs.spec import ModelShape

SAMPLES_PER_WEIGHT = 64


def shape_of(model: PreTrainedModel, fingerprint: str | None = None) -> ModelShape:
    """The ModelShape of a decoder with full attention in every layer; ValueError names what the store cannot hold.

    `fingerprint` names model, revision and RoPE settings; None takes `fingerprint_of(model)`.
    """
    config = model.config.get_text_config(decoder=True)
    _check_full_attention(config)
    attentions = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    scales = {float(cast(float, module.scaling)) for module in attentions}
    if len(attentions) != config.num_hidden_layers or len(scales) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(attentions)} attention layers of {len(scales)} scales; "
            f"the store needs {config.num_hidden_layers} alike"
        )
    return ModelShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        query_heads=config.num_attention_heads,
        head_dim=_head_dim(config, attentions[0]),
        dtype=cast(Literal["float32", "float16", "bfloat16"], str(model.dtype).removeprefix("torch.")),
        sm_scale=scales.pop(),
        logit_soft_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        model_fingerprint=fingerprint_of(model) if fingerprint is None else fingerprint,
    )


def fingerprint_of(model: PreTrainedModel) -> str:
    """A name for what makes keys and values: model type, RoPE settings and a sample of every weight.

    Equal for the same checkpoint wherever it was loaded from; a fine-tune, another dtype or another RoPE differs.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None)
    digest = hashlib.sha256(json.dumps(rope, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES_PER_WEIGHT)].float().cpu()
        digest.update(f"{name} {list(weight.shape)}".encode() + sample.numpy().tobytes())
    return f"{config.model_type} {digest.hexdigest()[:32]}"


def differences(model: ModelShape, session: ModelShape) -> list[str]:
    """What keeps a model from using a session, one text for each field; a fingerprint left empty fits any other."""
    found = []
    for field in ModelShape.model_fields:
        ours, theirs = getattr(model, field), getattr(session, field)
        unnamed = field == "model_fingerprint" and not (ours and theirs)
        if ours != theirs and not unnamed:
            found.append(f"{field} is {ours} in the model and {theirs} in the session")
    return found


def _check_full_attention(config: PreTrainedConfig) -> None:
    types = getattr(config, "layer_types", None)
    if types is None and getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"sliding_window {config.sliding_window}: every layer must attend to the whole prefix")
    other = [f"{index} ({kind})" for index, kind in enumerate(types or ()) if kind != "full_attention"]
    if other:
        raise ValueError(f"layers {', '.join(other)}: every layer must attend to the whole prefix")


def _head_dim(config: PreTrainedConfig, attention: nn.Module) -> int:
    width = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)
