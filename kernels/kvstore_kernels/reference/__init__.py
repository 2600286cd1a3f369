"""The ops in torch on the CPU: what every other implementation is compared with, and what serves where none is."""

from kvstore_kernels.reference.attend import attend, weigh
from kvstore_kernels.reference.decode import decode
from kvstore_kernels.reference.encode import encode
from kvstore_kernels.reference.expand import expand
from kvstore_kernels.reference.score import logits, score
from kvstore_kernels.reference.topk import topk

__all__ = ["attend", "decode", "encode", "expand", "logits", "score", "topk", "weigh"]
