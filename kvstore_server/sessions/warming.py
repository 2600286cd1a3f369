"""Compiles what a session's codec and shape need before its first query, beside whatever else the device does."""

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from kvstore_codecs.plan import Fit, SignPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_kernels import Backend, DenseRows, Rows, SignRows, as_torch_dtype

LOG = logging.getLogger(__name__)
WAIT_SECONDS = 300.0
TOKENS = 8
QUERY_TOKENS = (1, 2, 4, 8, 16, 32)
"""Kernels are specialised for few and for many query rows."""


class Warmer:
    """One thread; each kind of session once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._begun = set[tuple[str, str]]()
        self._thread = ThreadPoolExecutor(1, "kvstore-warming")

    def begin(self, spec: CodecSpec, shape: ModelShape) -> None:
        """Returns at once. Backends that read host memory have nothing to compile for one session."""
        key = (spec.fingerprint, shape.fingerprint)
        if self._backend.paging is not None and key not in self._begun:
            self._begun.add(key)
            self._thread.submit(self._warm, spec, shape)

    def wait(self) -> None:
        """Returns when all that was begun is done, or has taken too long to wait for."""
        with suppress(TimeoutError):
            self._thread.submit(lambda: None).result(WAIT_SECONDS)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _warm(self, spec: CodecSpec, shape: ModelShape) -> None:
        try:
            warm_up(self._backend.beside(), spec, shape)
        except ValueError as error:  # a codec whose bases are not known yet
            LOG.info("the first queries of such sessions compile: %s", error)
        except Exception:
            LOG.exception("warming up failed; the first queries of such sessions compile instead")


def warm_up(backend: Backend, spec: CodecSpec, shape: ModelShape) -> None:
    """Runs every op on a few tokens of every kind of layer that the codec has."""
    size = (shape.layers, shape.kv_heads, shape.head_dim)
    fit = Fit(torch.zeros(size), torch.zeros(size), 0, 1) if spec.needs_fit else None
    plan = plan_for(spec, shape, fit)
    x = torch.randn(TOKENS, *size[1:], generator=torch.Generator().manual_seed(0)).to(as_torch_dtype(shape.dtype))
    seen = set[object]()
    for layer in range(shape.layers):
        kinds = plan.of(layer, "keys"), plan.of(layer, "values")
        made = tuple(kind.layout if isinstance(kind, SignPlan) else None for kind in kinds)
        if made in seen:
            continue
        seen.add(made)
        keys, values = (
            SignRows(backend.encode(x, kind.encoder), kind.levels[0]) if isinstance(kind, SignPlan) else DenseRows(x)
            for kind in kinds
        )
        _ask(backend, shape, keys, values, kinds[0].debias if isinstance(kinds[0], SignPlan) else 0.0)
    _ask(backend, shape, DenseRows(x), DenseRows(x), 0.0)


def _ask(backend: Backend, shape: ModelShape, keys: Rows, values: Rows, debias: float) -> None:
    cap, one = (
        shape.logit_soft_cap,
        torch.zeros(1, shape.query_heads, shape.head_dim, dtype=as_torch_dtype(shape.dtype)),
    )
    for tokens in QUERY_TOKENS:
        q = one.repeat(tokens, 1, 1)
        backend.to_host(backend.attend(q, keys, values, sm_scale=shape.sm_scale, logit_soft_cap=cap, debias=debias))()
    how = {"sm_scale": shape.sm_scale, "logit_soft_cap": cap}
    backend.to_host((backend.score(one, keys, **how), *backend.best(one, keys, TOKENS, **how)))()
