"""Queries on one pinned prefix of a session."""

from collections.abc import AsyncIterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore_client.answers import FINEST, Attention, Fidelity, Precision, Scores, TopK
from kvstore_client.attend import Step
from kvstore_client.errors import Internal, invalid
from kvstore_client.info import SessionInfo
from kvstore_client.link import TIMEOUT_SECONDS, Link
from kvstore_client.rpcs import SCORE, TOP_K
from kvstore_client.tensors import from_proto, to_proto
from kvstore_proto.v1 import kvstore_pb2 as pb


@dataclass(frozen=True)
class Prefix:
    """Positions [0, end) of one generation: what all layers of one decode step must attend to.

    `q` is [T, heads, d], RoPE applied, heads counted from `head_offset`; results are on q's device.
    """

    link: Link
    info: SessionInfo
    end: int

    async def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        head_offset: int = 0,
        precision: Precision = FINEST,
        debias: float | None = None,
        refine: int = 0,
        timeout: float = TIMEOUT_SECONDS,
    ) -> tuple[Tensor, Tensor]:
        """(out [T, heads, d] in q's dtype, natural-log lse [T, heads] float32) over the prefix; empty: (0, -inf)."""
        answer = await self.attention(
            layer, q, head_offset=head_offset, precision=precision, debias=debias, refine=refine, timeout=timeout
        )
        return answer.out, answer.lse

    async def attention(
        self,
        layer: int,
        q: Tensor,
        *,
        head_offset: int = 0,
        precision: Precision = FINEST,
        debias: float | None = None,
        refine: int = 0,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Attention:
        """As `attend`, with what the answer was computed from. `debias` None is the codec's default.

        `refine` > 0: so many tokens of each row and head, the best at `precision`, are read at the finest level.
        """
        step = Step(
            session=self.info.name,
            generation=self.info.generation,
            end=self.end,
            layer=layer,
            q=_query(q),
            head_offset=head_offset,
            precision=precision,
            debias=debias,
            refine=refine,
        )
        result = await self.link.attend_stream(self.info.affinity).attend(step, timeout=timeout)
        if (result.lse_base, result.lse_layout) != (pb.LSE_BASE_E, pb.LSE_LAYOUT_TOKEN_MAJOR) or len(result.items) != 1:
            raise Internal("the server answered another lse base, layout or number of items than asked")
        return Attention(
            out=from_proto(result.out, dtype=q.dtype, shape=q.shape).to(q.device),
            lse=from_proto(result.lse, dtype=torch.float32, shape=q.shape[:2]).to(q.device),
            end=self.end,
            fidelity=Fidelity.from_proto(result.items[0].fidelity),
        )

    async def score(
        self,
        layer: int,
        q: Tensor,
        *,
        start: int = 0,
        head_offset: int = 0,
        precision: Precision = FINEST,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Scores:
        """Logits of positions [start, end)."""
        if not 0 <= start <= self.end:
            raise invalid("start", f"{start} is outside [0, {self.end}]", limit=self.end)
        request = pb.ScoreRequest(
            session=self.info.name,
            generation=self.info.generation,
            layer=layer,
            q=_query(q),
            head_offset=head_offset,
            token_start=start,
            token_end=self.end,
            precision=precision.to_proto(),
        )

        async def collect(replies: AsyncIterable[pb.ScoreResponse]) -> Scores:
            logits = torch.empty((*q.shape[:2], self.end - start))
            position, fidelity = start, pb.Fidelity()
            async for reply in replies:
                tokens = reply.scores.shape[-1] if reply.scores.shape else 0
                if reply.token_start != position or position + tokens > self.end:
                    raise Internal(f"scores came for {tokens} tokens from {reply.token_start}, not from {position}")
                piece = from_proto(reply.scores, dtype=torch.float32, shape=(*q.shape[:2], tokens))
                logits[..., position - start : position - start + tokens] = piece
                position, fidelity = position + tokens, reply.fidelity
            if position != self.end:
                raise Internal(f"scores end at position {position}, not {self.end}")
            return Scores(logits.to(q.device), start, Fidelity.from_proto(fidelity))

        return await self.link.download(SCORE, request, collect, timeout=timeout, affinity=self.info.affinity)

    async def topk(
        self,
        layer: int,
        q: Tensor,
        k: int,
        *,
        oversampling: float | None = None,
        head_offset: int = 0,
        precision: Precision = FINEST,
        timeout: float = TIMEOUT_SECONDS,
    ) -> TopK:
        """The k best positions; with `oversampling`, among the best oversampling * k at `precision`, by the finest."""
        request = pb.TopKRequest(
            session=self.info.name,
            generation=self.info.generation,
            layer=layer,
            q=_query(q),
            head_offset=head_offset,
            end=self.end,
            k=k,
            precision=precision.to_proto(),
            rescore=oversampling is not None,
            oversampling=oversampling or 0.0,
        )
        reply = await self.link.unary(TOP_K, request, timeout=timeout, affinity=self.info.affinity)
        shape = (*q.shape[:2], min(k, self.end))
        return TopK(
            positions=from_proto(reply.positions, dtype=torch.int64, shape=shape).to(q.device),
            logits=from_proto(reply.scores, dtype=torch.float32, shape=shape).to(q.device),
            end=self.end,
            fidelity=Fidelity.from_proto(reply.fidelity),
        )


def _query(q: Tensor) -> pb.Tensor:
    if q.dim() != 3 or not q.is_floating_point():
        raise invalid("q", f"must be a float tensor [T, heads, d], not {q.dtype} {list(q.shape)}")
    return to_proto(q, "q")
