"""Merging what the store answers with attention over a worker's own tokens, and the conventions of its peers.

Here `lse` [T, heads] float32 is the natural logarithm of the sum of exponentials and `out` [T, heads, d] is normalised
over its own keys. Key sets that are merged must be disjoint. An empty set has lse -inf (or +inf, as some kernels say).
"""

from collections.abc import Iterable

from torch import Tensor

from kvstore_kernels.merge import merge_states

LOG2_E = 1.4426950408889634


def merge(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) over the union of the key sets, computed in float32, `out` in the first part's dtype.

    Exact, whatever the order; all empty gives (0, -inf). What an empty part holds as `out` is not looked at.
    """
    states = [(out.masked_fill(lse.isinf().unsqueeze(-1), 0), lse) for out, lse in parts]
    if not states:
        raise ValueError("nothing to merge")
    out, lse = merge_states(states)
    return out.to(states[0][0].dtype), lse


def to_vllm(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_attn_states` takes it: lse [heads, T], a view."""
    return out, lse.t()


def to_sglang(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_state` takes it: the convention used here."""
    return out, lse


def to_flashinfer(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_state` takes it: base 2."""
    return out, lse * LOG2_E


def from_flashinfer(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """From base 2."""
    return out, lse / LOG2_E
