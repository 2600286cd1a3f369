"""Sums of alpha^2 over the first n sketched tokens, for any n: what the standard error of an answer needs."""

from torch import Tensor

from kvstore_kernels import SignLayout, alpha_columns, sum_of_squares

STEP_TOKENS = 1024


class SquareSums:
    """Keeps the sums at every 1,024th token, so that a query adds up few rows, and the last answer."""

    def __init__(self, layout: SignLayout) -> None:
        self._columns = alpha_columns(layout)
        self._kept: list[Tensor] = []
        self._last: tuple[int, Tensor] | None = None

    def mean(self, scales: Tensor, tokens: int) -> Tensor:
        """float64 [H, G]: the mean over the first `tokens` > 0 rows of scales [N, S], which only ever grows."""
        if self._last is not None and self._last[0] == tokens:
            return self._last[1]
        while (len(self._kept) + 1) * STEP_TOKENS <= tokens:
            first = len(self._kept) * STEP_TOKENS
            block = sum_of_squares(scales[first : first + STEP_TOKENS], self._columns)
            self._kept.append(block + self._kept[-1] if self._kept else block)
        whole = tokens // STEP_TOKENS
        total = sum_of_squares(scales[whole * STEP_TOKENS : tokens], self._columns)
        if whole:
            total = total + self._kept[whole - 1]
        self._last = (tokens, total / tokens)
        return self._last[1]
