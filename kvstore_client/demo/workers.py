"""What the demo's worker processes do. Heavy imports are inside, so that the parent stays light."""

import os
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kvstore_client.demo.messages import Compared, Continued, Plan, Prefilled, Progress, Unusable
from kvstore_client.demo.processes import await_go

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from kvstore_client import KVStoreClient, SyncSession

    Pipe = Connection[Any, Any]

GO_SECONDS = 1800.0
"""For the stages of the others."""
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def prefill_and_compare(pipe: "Pipe", plan: Plan) -> None:
    """Reads the text once, appends its cache to two sessions; when told, compares both with the exact cache."""
    model, tokenizer = _load(pipe, threads=os.cpu_count() or 1)
    import torch

    from kvstore_client import KVStoreClient
    from kvstore_client.demo.compare import agreement, prefill, through_store
    from kvstore_client.integrations.transformers import ATTENTION

    ids = tokenizer(USER + plan.text, return_tensors="pt").input_ids[:, : plan.tokens]
    if ids.shape[1] < plan.tokens:
        raise Unusable(f"the text has {ids.shape[1]} tokens; {plan.tokens} are needed")
    begun = perf_counter()
    cache, exact = prefill(model, ids, plan.compared, _progress(pipe, "prefill", plan.tokens))
    prefill_seconds = perf_counter() - begun
    with KVStoreClient(plan.target) as client:
        lossy, raw = _share(pipe, plan, client, model, cache, prefill_seconds)
        await_go(pipe, GO_SECONDS)
        # From here on most of the work is the server's, which has threads of its own.
        torch.set_num_threads(1)
        model.set_attn_implementation(ATTENTION)
        comparing = _progress(pipe, "teacher forcing", 2 * plan.compared)
        exactly = through_store(model, raw, ids, plan.compared, comparing)
        lossily = through_store(model, lossy, ids, plan.compared, lambda done: comparing(plan.compared + done))
        pipe.send(Compared(raw=agreement(exact, exactly), lossy=agreement(exact, lossily)))


def _share(
    pipe: "Pipe",
    plan: Plan,
    client: "KVStoreClient",
    model: "PreTrainedModel",
    cache: "Cache",
    prefill_seconds: float,
) -> "tuple[SyncSession, SyncSession]":
    """Appends the cache to a lossy and to a raw session, and reports the lossy one."""
    from kvstore_client.demo.setting import LOSSY
    from kvstore_client.integrations.model_shape import shape_of
    from kvstore_client.integrations.transformers import append_prefix
    from kvstore_codecs.spec import RAW

    shape, appending = shape_of(model), _progress(pipe, "append", 2)
    lossy, raw = (
        client.create_session(plan.lossy_session, shape, LOSSY),
        client.create_session(plan.raw_session, shape, RAW),
    )
    begun = perf_counter()
    append_prefix(lossy, cache)
    append_seconds = perf_counter() - begun
    appending(1)
    append_prefix(raw, cache)
    appending(2)
    shared = Prefilled(
        tokens=lossy.length,
        fp16_bytes=2 * lossy.length * 2 * shape.layers * shape.kv_heads * shape.head_dim,
        stored_bytes=lossy.info().stored_bytes,
        prefill_seconds=prefill_seconds,
        append_seconds=append_seconds,
    )
    pipe.send(shared)
    return lossy, raw


def answer(pipe: "Pipe", plan: Plan, question: str, tokens: int, more_tokens: int) -> None:
    """Opens the shared session by name and decodes an answer; when told, `more_tokens` of the same answer."""
    model, tokenizer = _load(pipe, threads=1)
    from kvstore_client import KVStoreClient
    from kvstore_client.demo.decoder import Decoder
    from kvstore_client.integrations.transformers import ATTENTION

    model.set_attn_implementation(ATTENTION)
    with KVStoreClient(plan.target) as client:
        session = client.open_session(plan.lossy_session)
        decoder = Decoder(model, tokenizer, session, f"\n\n{question}{ASSISTANT}")
        progress = _progress(pipe, "answer", tokens + more_tokens)
        pipe.send(decoder.decode(tokens, progress, whole=not more_tokens))
        if more_tokens:
            await_go(pipe, GO_SECONDS)
            moved = decoder.session.moved()
            pipe.send(Continued(decoder.decode(more_tokens, progress, whole=True), moved))


def _load(pipe: "Pipe", threads: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    pipe.send(Progress("load the model", 0, None))
    import torch

    from kvstore_client.demo.model import load

    torch.set_num_threads(threads)
    loaded = load(lambda: pipe.send(Progress("convert the model (first time only)", 0, None)))
    pipe.send(Progress("load the model", 1, 1))
    return loaded


def _progress(pipe: "Pipe", task: str, total: int) -> Callable[[int], None]:
    pipe.send(Progress(task, 0, total))
    return lambda done: pipe.send(Progress(task, done, total))
