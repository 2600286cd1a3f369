"""Attention where keys and values of one layer are stored in different ways, from the ops for either kind.

A codec may keep one layer's keys as vectors and its values as signs, or the other way. Such layers are few (the first
or last of a model), so logits and decoded values of a block of tokens at a time are cheap enough. Sketched values come
as rows, in host memory or on the device, because pages of values hold bits by channel.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvstore_kernels.cuda import decode, dense, score
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, SignPages, on_device
from kvstore_kernels.merge import merge_states
from kvstore_kernels.shapes import query_group
from kvstore_kernels.types import DenseRows, Rows, Signs

BLOCK_TOKENS = 16_384
State = tuple[Tensor, Tensor]


def attend(
    q: Tensor,
    keys: SignPages | DenseRows,
    values: Rows,
    *,
    sm_scale: float,
    logit_soft_cap: float,
    debias: float,
) -> State:
    """Out float32 [T, Hq, D] and natural-log lse float32 [T, Hq]; blocks are fixed by position, never by load."""
    tokens = _length(keys)
    if not tokens:
        return torch.zeros_like(q, dtype=torch.float32), torch.full(q.shape[:2], -torch.inf, device=q.device)
    states = list[State]()
    for start in range(0, tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, tokens)
        logits = _logits(q, _cut(keys, start, end), sm_scale, logit_soft_cap, debias)
        states.append(_weighted(logits, _vectors(values, start, end, q.device)))
    return merge_states(states)


def _length(rows: SignPages | DenseRows) -> int:
    return rows.pages.end - rows.pages.first if isinstance(rows, SignPages) else rows.data.shape[0]


def _cut(rows: SignPages | DenseRows, start: int, end: int) -> SignPages | DenseRows:
    if isinstance(rows, DenseRows):
        return DenseRows(rows.data[start:end])
    first = rows.pages.first
    return SignPages(replace(rows.pages, first=first + start, end=first + end), rows.expansion)


def _logits(q: Tensor, keys: SignPages | DenseRows, sm_scale: float, soft_cap: float, debias: float) -> Tensor:
    """float32 [T, Hq, N]."""
    if isinstance(keys, DenseRows):
        return dense.score(q, keys.data, sm_scale=sm_scale, logit_soft_cap=soft_cap)
    logits = score.score(q, keys, sm_scale=sm_scale)
    if debias:
        logits = logits - debias / 2 * sm_scale**2 * _variances(q, keys)
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def _variances(q: Tensor, keys: SignPages) -> Tensor:
    """sum_g alpha_g^2 N_g(q), float32 [T, Hq, N]."""
    expansion = keys.expansion
    heads, group = expansion.layout.heads, query_group(q, expansion.layout.heads, expansion.layout.head_dim)
    rows = q.float().unflatten(1, (heads, group))
    forms = expansion.noise_form.to(q.device)
    noise = torch.stack([((rows @ form) * rows).sum(3) for form in forms.unbind(1)], 3)  # [T, H, group, G]
    return torch.einsum("thrg,hgn->thrn", noise, _scales(keys, 0).square()).flatten(1, 2)


def _scales(rows: SignPages, first: int) -> Tensor:
    """float32 [H, G, N]: of each head the scales from its `first` on, 0 where it stores none."""
    pages, layout = rows.pages, rows.expansion.layout
    page_first, page_end = pages.first // PAGE_TOKENS, -(-pages.end // PAGE_TOKENS)
    lines = pages.slab[: len(pages.slab) // PAGE_UNIT * PAGE_UNIT].view(-1, PAGE_UNIT)
    starts = pages.table[page_first:page_end].long()
    out = torch.zeros(layout.heads, layout.groups, len(starts) * PAGE_TOKENS, device=pages.slab.device)
    for head, (_, scale_start, _, stored) in enumerate(on_device(rows.expansion, pages.slab.device).heads.tolist()):
        for group in range(layout.groups if stored else 0):
            out[head, group] = lines[starts + scale_start + first + group].flatten().view(torch.float16)
    return out[:, :, pages.first - page_first * PAGE_TOKENS :][:, :, : pages.end - pages.first]


def _vectors(values: Rows, start: int, end: int, device: torch.device) -> Tensor:
    """float32 [end - start, H, D]."""
    if isinstance(values, DenseRows):
        return values.data[start:end].float()
    words, scales = (part[start:end].to(device) for part in (values.signs.words, values.signs.scales))
    return decode.decode(Signs(words, scales), values.expansion, torch.float32)


def _weighted(logits: Tensor, vectors: Tensor) -> State:
    """Softmax over [T, Hq, N] and the weighted sum of [N, H, D]."""
    top = logits.amax(2, keepdim=True)
    weights = torch.exp(logits - top)
    total = weights.sum(2)
    heads = vectors.shape[1]
    grouped = weights.unflatten(1, (heads, -1))
    out = torch.einsum("thrn,nhd->thrd", grouped, vectors).flatten(1, 2) / total.unsqueeze(2)
    return out, top.squeeze(2) + total.log()
