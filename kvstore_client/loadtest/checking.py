"""What answers must be: asked once while nothing else goes on, and compared with attention computed here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore_client import Session, TopK
from kvstore_client.loadtest.vectors import Vectors

ROUNDING = 1 / 128
"""Of a 16-bit output: its last bit may fall either way."""
LSE_AGREEMENT = 1e-4
ATTENTION_ERROR_MAX = 0.1
"""Of attention here over the vectors that the server decodes, relative; queries are quantised there."""
DECODED_ERROR_MAX = 1.0
"""Of decoded vectors, relative: other vectors would be off by more than this, however coarse the codec."""
SAME_POSITIONS = 0.9
"""Of a top k: positions of nearly equal logits may change places."""
SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Expected:
    """Of the same query rows in every layer: out [T, Hq, D], lse [T, Hq], positions and logits [T, Hq, k]."""

    attended: list[tuple[Tensor, Tensor]]
    best: list[tuple[Tensor, Tensor]]

    def is_attention(self, layer: int, row: int, out: Tensor, lse: Tensor) -> bool:
        expected, expected_lse = (part[row : row + 1].float() for part in self.attended[layer])
        return torch.allclose(out.float(), expected, rtol=ROUNDING, atol=1e-5) and torch.allclose(
            lse, expected_lse, rtol=0, atol=LSE_AGREEMENT
        )

    def is_top_k(self, layer: int, row: int, answer: TopK) -> bool:
        positions, logits = (part[row : row + 1] for part in self.best[layer])
        same = (answer.positions == positions).float().mean()
        return bool(same >= SAME_POSITIONS) and torch.allclose(answer.logits, logits, rtol=0, atol=LSE_AGREEMENT)


async def expected_of(session: Session, rows: Tensor, *, top_k: int, attends: bool, timeout: float) -> Expected:
    """Asks for all `rows` [T, Hq, D] at once in each layer; this also brings the session to its device."""
    layers, prefix = range(session.shape.layers), session.pin()
    attended = [await prefix.attend(layer, rows, timeout=timeout) for layer in layers] if attends else []
    best = [await prefix.topk(layer, rows, top_k, timeout=timeout) for layer in layers] if top_k else []
    return Expected(attended, [(each.positions, each.logits) for each in best])


async def is_attention_over_what_was_sent(session: Session, vectors: Vectors, rows: Tensor, timeout: float) -> bool:
    """In the first and the last layer the vectors are those sent, as well as the codec can, and attention is theirs."""
    end = min(session.length, vectors.tokens)
    for layer in {0, session.shape.layers - 1}:
        keys, values = await session.fetch(layers=[layer], end=end, dtype=torch.float32, timeout=timeout)
        if not is_what_was_sent(vectors, layer, 0, keys, values):
            return False
        out, _ = await session.attend(layer, rows.float(), end=end, debias=0.0, timeout=timeout)
        expected = _attention(session, rows.float(), keys[0], values[0])
        if (out - expected).norm() > ATTENTION_ERROR_MAX * expected.norm():
            return False
    return True


async def holds_what_was_sent(session: Session, vectors: Vectors, length: int, timeout: float) -> bool:
    """The server's length is what it acknowledged, and the last tokens are those sent."""
    if (await session.info(timeout=timeout)).length != length:
        return False
    start = max(0, length - SAMPLE_TOKENS, (length - 1) // vectors.tokens * vectors.tokens)
    layer = session.shape.layers - 1
    keys, values = await session.fetch(layers=[layer], start=start, end=length, dtype=torch.float32, timeout=timeout)
    return is_what_was_sent(vectors, layer, start, keys, values)


def is_what_was_sent(vectors: Vectors, layer: int, start: int, keys: Tensor, values: Tensor) -> bool:
    """`keys`, `values` [1, N, H, D] decoded from position `start` on."""
    sent = vectors.between(start, start + keys.shape[1])
    pairs = zip((keys, values), (part[layer : layer + 1].float() for part in sent), strict=True)
    return all((found - true).norm() <= DECODED_ERROR_MAX * true.norm() for found, true in pairs)


def _attention(session: Session, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[T, Hq, D] over keys and values [N, H, D], in float32."""
    shape = session.shape
    group = shape.query_heads // shape.kv_heads
    k, v = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    logits = torch.einsum("thd,nhd->htn", q, k) * shape.sm_scale
    return torch.einsum("htn,nhd->thd", logits.softmax(-1), v)
