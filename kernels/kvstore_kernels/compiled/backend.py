"""The CPU's backend where numba is installed."""

from kvstore_kernels.backend import ReferenceBackend
from kvstore_kernels.compiled.attend import attend, weigh
from kvstore_kernels.compiled.decode import decode
from kvstore_kernels.compiled.encode import encode
from kvstore_kernels.compiled.score import score
from kvstore_kernels.refined import Ops


class CompiledBackend(ReferenceBackend):
    """Kernels compile at their first call, once for all processes that share a cache."""

    encode = staticmethod(encode)
    score = staticmethod(score)
    attend = staticmethod(attend)
    _decode = staticmethod(decode)
    _ops = Ops(score, ReferenceBackend.topk, weigh)
