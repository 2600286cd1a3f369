"""What a codec costs a model that decodes behind a real server, its prefix made by the exact model, its tail local."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore_client import KVStoreClient, Precision
from kvstore_client.demo.compare import BLOCK_TOKENS, through_store
from kvstore_client.demo.server import ServerProcess
from kvstore_client.integrations.transformers import ATTENTION
from kvstore_client.projections.quality import Quality, compared, exact_pass, quality_of
from kvstore_client.projections.rows import CodecRow
from kvstore_client.sync import SyncSession
from kvstore_codecs.spec import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_served(
    model: "PreTrainedModel",
    texts: Sequence[Tensor],
    rows: Mapping[str, CodecRow],
    files: Sequence[bytes],
    *,
    from_token: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Quality]:
    """Each row over texts [1, T], which a server stores whole; `files` are the projections that rows name.

    Tokens come in blocks of 64: each reads all blocks before its own from the server.
    """
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in rows}
    with TemporaryDirectory(prefix="kvstore-quality-") as folder, torch.inference_mode():
        server = ServerProcess(Path(folder))
        server.start()
        try:
            with KVStoreClient(server.target) as client:
                for data in files:
                    client.put_projection(data)
                for index, ids in enumerate(texts):
                    exact, seen = exact_pass(model, ids)
                    for number, (name, row) in enumerate(rows.items()):
                        session = client.create_session(f"{number}-{index}", row.shape, row.spec)
                        session.append(seen.keys, seen.values)
                        first = max(from_token // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS)
                        logits = _behind(model, _AtLevel(session, row.level), ids, ids.shape[1] - first)
                        sums[name] += compared(exact[first:-1], logits[:-1], ids[0, first + 1 :])
                        session.delete()
                        done(index * len(rows) + number + 1)
        finally:
            server.stop()
    return {name: quality_of(total) for name, total in sums.items()}


def _behind(model: "PreTrainedModel", session: "_AtLevel", ids: Tensor, count: int) -> Tensor:
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(ATTENTION)
    try:
        return through_store(model, session, ids, count, lambda _: None)
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class _AtLevel:
    """A RemoteSession whose keys and values are read at a level."""

    session: SyncSession
    level: int

    @property
    def name(self) -> str:
        return self.session.name

    @property
    def shape(self) -> ModelShape:
        return self.session.shape

    @property
    def length(self) -> int:
        return self.session.length

    def append(self, k: Tensor, v: Tensor, *, start: int | None = None) -> int:
        return self.session.append(k, v, start=start)

    def attend(self, layer: int, q: Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]:
        return self.session.attend(layer, q, end=end, precision=Precision(self.level, self.level))
