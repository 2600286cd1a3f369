"""What every op takes and returns: packed sign sketches, how to read them, how to make them.

Letters: N stored tokens, T query tokens, H KV heads, Hq query heads, D head_dim, m sign rows of one head, G scale
groups. Stored tensors are token-major. Words are little-endian uint32 bit patterns held as int32, because torch has no
uint32 arithmetic: bit j of word w of a head is row 32 w + j, 1 for t = +1 and 0 for t = -1 (so sign(0) is -1).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

WORD_ROWS = 32


class NonFiniteError(ValueError):
    """The input holds NaN or Inf; `token` and `head` name the first place."""

    def __init__(self, token: int, head: int) -> None:
        super().__init__(f"NaN or Inf at token {token}, KV head {head}")
        self.token, self.head = token, head


class ScaleRangeError(ValueError):
    """A scale or offset is beyond what fp16 holds (65504); `token` and `head` name the first place."""

    def __init__(self, token: int, head: int) -> None:
        super().__init__(f"the scale of token {token}, KV head {head} is beyond fp16 (65504)")
        self.token, self.head = token, head


@dataclass(frozen=True)
class SignLayout:
    """Where each KV head's words and scales lie in one token's row of one layer and kind.

    `word_groups[h]` gives the scale group of each 32-row word of head h, so m_h = 32 * len(word_groups[h]); 0 words
    mean that head stores nothing and is read as its mean. All heads with words have `groups` scales (alpha), then,
    where `has_offsets`, as many offsets (beta).
    """

    head_dim: int
    groups: int
    word_groups: tuple[tuple[int, ...], ...]
    has_offsets: bool = False

    def __post_init__(self) -> None:
        for head, groups in enumerate(self.word_groups):
            if any(not 0 <= g < self.groups for g in groups):
                raise ValueError(f"word_groups[{head}] names a group outside [0, {self.groups})")

    @property
    def heads(self) -> int:
        return len(self.word_groups)

    @cached_property
    def word_starts(self) -> tuple[int, ...]:
        """H + 1 offsets into a token's words; the last is the number of words a token."""
        return tuple(accumulate((len(g) for g in self.word_groups), initial=0))

    @cached_property
    def scale_starts(self) -> tuple[int, ...]:
        """H + 1 offsets into a token's scales; the last is the number of scales a token."""
        width = self.groups * (2 if self.has_offsets else 1)
        return tuple(accumulate((width if g else 0 for g in self.word_groups), initial=0))

    @property
    def words(self) -> int:
        return self.word_starts[-1]

    @property
    def scales(self) -> int:
        return self.scale_starts[-1]

    @property
    def bytes_per_token(self) -> int:
        return 4 * self.words + 2 * self.scales


@dataclass(frozen=True)
class Signs:
    """Packed sketches of N tokens of one layer and kind.

    `words` int32 [N, layout.words] and `scales` float16 [N, layout.scales]. A token's scales are, head by head,
    alpha[0..G) and, with offsets, beta[0..G).
    """

    words: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Expansion:
    """How a reader turns sketches into numbers, at one level, for one layer and kind.

        x^ = mean + sum_g ( alpha_g E_g^T t_g + beta_g f_g )

    `matrix[h]` is E [m_h, D] float32 over the first `m_h / 32` words of the head (a level reads a prefix of the stored
    words; its refitted weights and its ratio of alpha are inside E). `noise[h]` [m_h] gives the variance of a score as
    alpha_g^2 * sum_{r in g} noise_r (E q)_r^2. `offset_basis` is f [G, D], only for layouts with offsets.
    """

    layout: SignLayout
    matrix: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    mean: Tensor
    query_bits: int
    offset_basis: Tensor | None = None

    def read_words(self, head: int) -> int:
        return self.matrix[head].shape[0] // WORD_ROWS

    @cached_property
    def by_head(self) -> "tuple[Expansion, ...]":
        """One expansion for each head alone."""
        return tuple(
            replace(
                self,
                layout=replace(self.layout, word_groups=(groups,)),
                matrix=(matrix,),
                noise=(noise,),
                mean=mean.unsqueeze(0),
            )
            for groups, matrix, noise, mean in zip(
                self.layout.word_groups, self.matrix, self.noise, self.mean, strict=True
            )
        )

    @cached_property
    def noise_form(self) -> Tensor:
        """float32 [H, G, D, D], symmetric: N_g(q) = sum_{r in g} noise_r (E q)_r^2 = q^T noise_form[h, g] q."""
        layout = self.layout
        forms = torch.zeros(layout.heads, layout.groups, layout.head_dim, layout.head_dim)
        for head, rows in enumerate(self.matrix):
            of_row = torch.tensor(layout.word_groups[head][: self.read_words(head)]).repeat_interleave(WORD_ROWS)
            for group in range(layout.groups):
                own = rows[of_row == group]
                forms[head, group] = own.T @ (self.noise[head][of_row == group].unsqueeze(1) * own)
        return forms

    @cached_property
    def noise_factor(self) -> Tensor | None:
        """float32 [H, G] where N_g(q) = noise_factor[h, g] |q|^2, as for whole orthogonal blocks; None otherwise."""
        factor = self.noise_form.diagonal(dim1=2, dim2=3).mean(2)
        identity = torch.eye(self.layout.head_dim)
        error = (self.noise_form - factor[..., None, None] * identity).abs().amax((2, 3))
        return factor if bool((error <= 1e-5 * factor).all()) else None


@dataclass(frozen=True)
class SignRows:
    """Stored sign sketches with the expansion that reads them."""

    signs: Signs
    expansion: Expansion


@dataclass(frozen=True)
class DenseRows:
    """Vectors kept as they are: [N, H, D], any float dtype (codec `raw`, exact tokens)."""

    data: Tensor


Rows = SignRows | DenseRows


@dataclass(frozen=True)
class HeadEncoder:
    """One KV head's way from a vector to sign rows.

    z = projection (x - mean) [C]; coordinate c is quantised to `depth[c]` bits with uniform thresholds of width
    step(depth) * sigma[c] * gain, gain being the token's own rms of z / sigma over coded coordinates; row r stores bit
    `row_shift[r]` of the natural-binary index of coordinate `row_coordinate[r]`, and counts `row_weight[r]` in the
    reconstruction y_c = sum_r row_weight_r t_r.
    """

    projection: Tensor  # [C, D] float32
    depth: Tensor  # [C] int32, 0..6
    sigma: Tensor  # [C] float32
    row_coordinate: Tensor  # [m] int32
    row_shift: Tensor  # [m] int32
    row_weight: Tensor  # [m] float32


@dataclass(frozen=True)
class SignEncoder:
    """What `encode` needs for one layer and kind.

    Scale of group g: `ip` (inner-product preserving) alpha = energy / sum_{r in g} row_weight_r z_r t_r with energy =
    |x - mean|^2 over the group's input channels (`support` [G, D], 0 or 1) or, with `coded_energy`, |z|^2 over coded
    coordinates; `norm` alpha = norm_factor[g] * |x - mean| over the group's channels (the paper's rule).
    """

    layout: SignLayout
    heads: tuple[HeadEncoder, ...]
    mean: Tensor  # [H, D] float32
    support: Tensor  # [G, D] float32
    norm_factor: tuple[float, ...] | None = None
    coded_energy: bool = False


@dataclass(frozen=True)
class AffineEncoder:
    """Per-token groups of 32 channels, min/max to `planes` bits: alpha is half a code step, beta the middle.

    Words are plane-major (most significant first), so that fewer planes are a prefix: word p * G + g.
    """

    layout: SignLayout
    planes: int
    mean: Tensor  # [H, D] float32


Encoder = SignEncoder | AffineEncoder

# Uniform threshold widths of a unit normal coordinate by bits: MSE-optimal mid-rise steps (codec reference: Max 1960).
STEP = {1: 1.0, 2: 0.98160, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041}


def plane_weights(planes: int) -> tuple[float, ...]:
    """Reconstruction weights A_p, most significant plane first, of a unit normal coordinate: value = sum_p A_p t_p.

    One and two planes are the Lloyd-Max levels exactly; from three the mid-rise levels step / 2 * 2^(b - p).
    """
    if planes == 1:
        return (0.797885,)
    if planes == 2:
        return (0.981598, 0.528819)
    return tuple(STEP[planes] / 2 * 2 ** (planes - 1 - p) for p in range(planes))


def as_torch_dtype(name: str) -> torch.dtype:
    """`float32`, `float16` or `bfloat16` as torch's dtype; ValueError for any other name."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]
