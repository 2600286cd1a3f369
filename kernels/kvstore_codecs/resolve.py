"""From a codec spec to what each layer does."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from kvstore_codecs.affine import affine_plan
from kvstore_codecs.plan import CodecPlan, DensePlan, Fit, KindPlan, NotFittedError, SignPlan, digest_of
from kvstore_codecs.qjl import qjl_plan
from kvstore_codecs.rotated import rotated_plan
from kvstore_codecs.spec import KINDS, Affine, CodecSpec, Kind, ModelShape, Qjl, Raw, Rotated
from kvstore_kernels.types import SignEncoder

_PLANS_MAX = 64
_BASES_MAX = 512
_DEBIAS = {"raw": 0.0, "qjl": 0.5, "rotated": 0.5, "affine": 0.0}


def check_spec(spec: CodecSpec, shape: ModelShape) -> None:
    """ValueError, naming field and limit, if the codec does not fit the shape."""
    for index, override in enumerate(spec.overrides):
        for layer in override.layers:
            if not -shape.layers <= layer < shape.layers:
                raise ValueError(f"overrides[{index}].layers: {layer} is outside [-{shape.layers}, {shape.layers})")
    for path, codec in spec.codecs():
        channels = codec.outlier_channels if isinstance(codec, Qjl) else ()
        if channels and channels[-1] >= shape.head_dim:
            raise ValueError(f"{path}.outlier_channels: {channels[-1]} is outside [0, {shape.head_dim}), head_dim")
        if len(channels) == shape.head_dim:
            raise ValueError(f"{path}.outlier_channels: at most {shape.head_dim - 1} channels, one must be an inlier")


@lru_cache(maxsize=_PLANS_MAX)
def plan_for(spec: CodecSpec, shape: ModelShape, fit: Fit | None) -> CodecPlan:
    """The plan of every layer; `fit` is ignored by a codec that needs none.

    Bases are cached apart from the means, so sessions that differ in their fit share them; the first plan of a large
    Haar codec takes seconds. Raises as `check_spec`, NotFittedError, ValueError if the fit is of another shape.
    """
    check_spec(spec, shape)
    fit = fit if spec.needs_fit else None
    if spec.needs_fit and fit is None:
        raise NotFittedError
    expected = (shape.layers, shape.kv_heads, shape.head_dim)
    if fit is not None and not expected == fit.mean_keys.shape == fit.mean_values.shape:
        raise ValueError(f"the fit's means are {[*fit.mean_keys.shape]}, not {[*expected]}")
    plans: dict[Kind, list[KindPlan]] = {kind: [] for kind in KINDS}
    digests: list[str] = []
    for layer in range(shape.layers):
        for kind in KINDS:
            codec = spec.for_layer(layer, kind, shape.layers)
            if isinstance(codec, Raw):
                plans[kind].append(DensePlan())
                continue
            plan, digest = _unfitted(codec, shape.head_dim, shape.kv_heads, layer, kind)
            digests.append(digest)
            plans[kind].append(plan if fit is None else _with_mean(plan, fit.of(kind)[layer]))
    basis = digest_of("\n".join(digests), ())
    return CodecPlan(spec, shape, fit, tuple(plans["keys"]), tuple(plans["values"]), basis)


def default_debias(spec: CodecSpec, layer: int, layers: int) -> float:
    """The share of half each key's score variance that attention subtracts, unless the query says otherwise.

    One half is best for the data-oblivious codecs (measured); dense and affine keys have next to no such noise.
    """
    return _DEBIAS[spec.for_layer(layer, "keys", layers).name]


@lru_cache(maxsize=_BASES_MAX)
def _unfitted(codec: Qjl | Rotated | Affine, d: int, heads: int, layer: int, kind: Kind) -> tuple[SignPlan, str]:
    """The plan with zero means and the digest of its basis; every layer and kind has a seed of its own."""
    seed = f"{getattr(codec, 'seed', 0)}/{layer}/{kind}"
    if isinstance(codec, Qjl):
        plan = qjl_plan(codec, d, heads, seed)
    elif isinstance(codec, Rotated):
        plan = rotated_plan(codec, d, heads, seed)
    else:
        plan = affine_plan(codec, d, heads)
    return plan, digest_of(f"{layer} {kind} {plan.layout.word_groups} {_norm_factor(plan)}", _basis_tensors(plan))


def _basis_tensors(plan: SignPlan) -> Iterator[Tensor]:
    if isinstance(plan.encoder, SignEncoder):
        yield plan.encoder.support
        for head in {id(head): head for head in plan.encoder.heads}.values():
            yield from (head.projection, head.depth, head.sigma, head.row_coordinate, head.row_shift, head.row_weight)


def _norm_factor(plan: SignPlan) -> tuple[float, ...] | None:
    return plan.encoder.norm_factor if isinstance(plan.encoder, SignEncoder) else None


def _with_mean(plan: SignPlan, mean: Tensor) -> SignPlan:
    levels = tuple(replace(level, mean=mean) for level in plan.levels)
    return SignPlan(plan.layout, replace(plan.encoder, mean=mean), levels)
