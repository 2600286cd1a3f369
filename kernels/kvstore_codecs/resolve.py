"""From a codec spec to what each layer does."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from kvstore_codecs.affine import affine_plan
from kvstore_codecs.artifact import Projection
from kvstore_codecs.fitted import FittedPlans, fitted_plans
from kvstore_codecs.kept_plans import KeptPlans
from kvstore_codecs.matryoshka import level_budgets
from kvstore_codecs.plan import CodecPlan, DensePlan, Fit, KindPlan, NotFittedError, ProjectedPlan, SignPlan, digest_of
from kvstore_codecs.qjl import level_rows, qjl_plan
from kvstore_codecs.rotated import rotated_plan
from kvstore_codecs.spec import (
    KINDS,
    Affine,
    AnyCodec,
    CodecSpec,
    Fitted,
    Kind,
    Matryoshka,
    ModelShape,
    Projected,
    Qjl,
    Raw,
    Rotated,
)
from kvstore_kernels.types import SignEncoder

KEPT = KeptPlans(bytes_max=2**30, plans_max=64)
_BASES_MAX = 256
_BASIS_BYTES_MAX = 2**30


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
    if basis_bytes(spec, shape) > _BASIS_BYTES_MAX:
        raise ValueError(f"the codec's bases take {basis_bytes(spec, shape)} bytes, the limit is {_BASIS_BYTES_MAX}")


def basis_bytes(spec: CodecSpec, shape: ModelShape) -> int:
    """Memory of a plan's matrices, without making them: a projection and an E for every level.

    Heads share those that come from a seed; each has a fitted one of its own.
    """
    codecs = Counter(codec for kind in KINDS for codec in spec.of_layers(kind, shape.layers))
    rows = sum(
        count * _matrix_rows(codec, shape.head_dim) * (shape.kv_heads if isinstance(codec, Fitted) else 1)
        for codec, count in codecs.items()
    )
    return 4 * shape.head_dim * rows


def plan_for(
    spec: CodecSpec, shape: ModelShape, fit: Fit | None, projections: tuple[Projection, ...] = ()
) -> CodecPlan:
    """The plan of every layer; `fit` is ignored by a codec that needs none. `projections` are those the spec names.

    Bases are cached apart from the means, so sessions that differ in their fit share them; the first plan of a large
    Haar codec takes seconds. Raises as `check_spec`, NotFittedError, ValueError if the fit is of another shape or a
    projection is missing or for another model.
    """
    fit = fit if spec.needs_fit else None
    return KEPT.get((spec, shape, fit, projections), lambda: _made(spec, shape, fit, projections))


def _made(spec: CodecSpec, shape: ModelShape, fit: Fit | None, projections: tuple[Projection, ...]) -> CodecPlan:
    check_spec(spec, shape)
    if spec.needs_fit and fit is None:
        raise NotFittedError
    expected = (shape.layers, shape.kv_heads, shape.head_dim)
    if fit is not None and not expected == fit.mean_keys.shape == fit.mean_values.shape:
        raise ValueError(f"the fit's means are {[*fit.mean_keys.shape]}, not {[*expected]}")
    fitted = fitted_plans(spec, shape, fit, projections)
    keys, key_digests = _layer_plans(spec, shape, fit, fitted, "keys")
    values, value_digests = _layer_plans(spec, shape, fit, fitted, "values")
    return CodecPlan(spec, shape, fit, keys, values, digest_of("\n".join(key_digests + value_digests), ()))


def _layer_plans(
    spec: CodecSpec, shape: ModelShape, fit: Fit | None, fitted: FittedPlans, kind: Kind
) -> tuple[tuple[KindPlan, ...], list[str]]:
    plans: list[KindPlan] = []
    digests: list[str] = []
    for layer, codec in enumerate(spec.of_layers(kind, shape.layers)):
        if isinstance(codec, Raw):
            plans.append(DensePlan())
            continue
        if isinstance(codec, Fitted):
            own = fitted[layer, kind]
            plans.append(own)
            digests.append(_digest(layer, kind, own))
            continue
        plan, digest = _unfitted(codec, shape.head_dim, shape.kv_heads, layer, kind)
        plans.append(plan if fit is None else _with_mean(plan, fit.of(kind)[layer]))
        digests.append(digest)
    return tuple(plans), digests


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
    return plan, _digest(layer, kind, plan)


def _digest(layer: int, kind: Kind, plan: SignPlan | ProjectedPlan) -> str:
    """Of all that encoding depends on but the mean, which the fit or the artifact's name has."""
    if isinstance(plan, ProjectedPlan):
        return digest_of(f"{layer} {kind} {[len(rows) for rows in plan.forward]}", plan.forward)
    return digest_of(f"{layer} {kind} {plan.layout.word_groups} {_norm_factor(plan)}", _basis_tensors(plan))


def _matrix_rows(codec: AnyCodec, d: int) -> int:
    """Rows of the projection and of every level's E together."""
    if isinstance(codec, Raw):
        return 0
    if isinstance(codec, Qjl):
        outliers, levels = codec.outlier_bits if codec.outlier_channels else 0, level_rows(codec.bits, d)
        return codec.bits + sum(levels) + outliers * (1 + len(levels))
    if isinstance(codec, Projected):
        return 2 * math.ceil(codec.share * d)
    if isinstance(codec, Matryoshka):
        return d + math.ceil(d * sum(level_budgets(codec.bits)))
    read = d * codec.planes * (codec.planes + 1) // 2
    return read + d if isinstance(codec, Rotated) else read


def _basis_tensors(plan: SignPlan) -> Iterator[Tensor]:
    if isinstance(plan.encoder, SignEncoder):
        yield plan.encoder.support
        for head in {id(head): head for head in plan.encoder.heads}.values():
            yield from (head.projection, head.depth, head.sigma, head.row_coordinate, head.row_shift, head.row_weight)


def _norm_factor(plan: SignPlan) -> tuple[float, ...] | None:
    return plan.encoder.norm_factor if isinstance(plan.encoder, SignEncoder) else None


def _with_mean(plan: SignPlan, mean: Tensor) -> SignPlan:
    levels = tuple(replace(level, mean=mean) for level in plan.levels)
    return replace(plan, encoder=replace(plan.encoder, mean=mean), levels=levels)
