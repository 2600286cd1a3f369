"""Bases and means that learn: a projection's own, turned by orthogonal matrices that begin as the identity."""

from copy import deepcopy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from kvstore_codecs.artifact import Projection
from kvstore_codecs.spec import KINDS
from kvstore_codecs.transform import inverse_of


@dataclass(frozen=True)
class Coordinates:
    """Of [kinds, L, H] heads: `mean` [.., D], `basis` F and `inverse` F^-1 [.., D, D], `weights` [.., D].

    z = (x - mean) F and x = mean + z F^-1; a weight is the mean square of a coordinate over the calibration text.
    """

    mean: Tensor
    basis: Tensor
    inverse: Tensor
    weights: Tensor


class TrainableBases(nn.Module):
    """F = F0 Q, Q = (I - A/2)^-1 (I + A/2) with A skew: Cayley's map, which no Q with an eigenvalue -1 comes from.

    A basis itself often has such an eigenvalue, or nearly; the turn away from it has none as long as A is finite.
    Means move in units of what a coordinate of the first basis varies by. In those coordinates the covariance is
    diagonal, so weights of the turned basis need no vectors.
    """

    turn: Tensor
    first_mean: Tensor
    first_basis: Tensor
    first_inverse: Tensor
    first_weights: Tensor

    def __init__(self, start: Projection) -> None:
        super().__init__()
        bases = [start.basis(kind) for kind in KINDS]
        inverses = [torch.stack([torch.from_numpy(inverse_of(layer)) for layer in b.matrix]) for b in bases]
        self.register_buffer("first_mean", torch.stack([start.mean(kind) for kind in KINDS]))
        self.register_buffer("first_basis", torch.stack([basis.matrix for basis in bases]))
        self.register_buffer("first_inverse", torch.stack(inverses).float())
        self.register_buffer("first_weights", torch.stack([basis.weights for basis in bases]))
        d = self.first_mean.shape[-1]
        self.turn = nn.Parameter(torch.eye(d).expand(self.first_basis.shape).clone())
        self.shift = nn.Parameter(torch.zeros_like(self.first_mean))
        orthogonal(self, "turn", orthogonal_map="cayley")

    def forward(self) -> Coordinates:
        turn, shift = self.turn, self.shift * self.first_weights.sqrt()
        moved = (shift.unsqueeze(-2) @ self.first_inverse).squeeze(-2)
        turned = (shift.unsqueeze(-2) @ turn).squeeze(-2)
        weights = (turn.square() * self.first_weights.unsqueeze(-1)).sum(-2) + turned.square()
        return Coordinates(self.first_mean + moved, self.first_basis @ turn, turn.mT @ self.first_inverse, weights)

    def exactly(self) -> Coordinates:
        """In float64 on the CPU, without gradients."""
        copy = cast(TrainableBases, deepcopy(self).cpu().double())
        with torch.no_grad():
            return copy()
