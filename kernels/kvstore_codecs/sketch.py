"""What one append stores of one layer and kind."""

from dataclasses import dataclass

from torch import Tensor

from kvstore_kernels.types import Signs


@dataclass(frozen=True)
class KindRows:
    """One layer and kind of one append of n tokens, of which the first `exact` are exact.

    `rows` is [r, H, D] in the session's dtype: all n tokens of a DensePlan, the exact ones of a SignPlan. `signs` are the
    other n - exact tokens of a SignPlan, None for a DensePlan.
    """

    rows: Tensor
    signs: Signs | None
