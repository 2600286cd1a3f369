"""How much the demo does, the codec it shows, and what it must reach on its own text."""

from kvstore_codecs.spec import CodecSpec, LayerOverride, Rotated

TOKENS = 3_000
COMPARED_TOKENS = 256
"""The last ones of TOKENS, for teacher forcing."""
ANSWER_TOKENS = 48
"""Of each answer; the one that goes on after the restart makes half of them before."""

LOSSY = CodecSpec(
    keys=Rotated(planes=4),
    values=Rotated(planes=4),
    overrides=(LayerOverride(layers=tuple(range(-20, 0)), keys=Rotated(planes=5)),),
)
LOSSY_TEXT = "rotated: 4 bits, keys of the last 20 of 30 layers 5 bits; the first 4 tokens exact"

TOP1_MIN = 0.94
KL_MAX = 0.012
RATIO_MAX = 0.32
