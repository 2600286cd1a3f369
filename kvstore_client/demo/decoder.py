"""Greedy decoding behind a stored prefix, with the time of every attend step."""

from collections.abc import Callable
from time import perf_counter

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvstore_client.demo.messages import Answered
from kvstore_client.integrations.transformers import RemoteSession, StoreCache
from kvstore_codecs.spec import ModelShape


class TimedSession:
    """A session whose attend steps are timed: `seconds` holds them all."""

    def __init__(self, session: RemoteSession) -> None:
        self._session = session
        self._last: tuple[int, Tensor, int | None, Tensor] | None = None
        self.seconds: list[float] = []

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def shape(self) -> ModelShape:
        return self._session.shape

    @property
    def length(self) -> int:
        return self._session.length

    def append(self, k: Tensor, v: Tensor, *, start: int | None = None) -> int:
        return self._session.append(k, v, start=start)

    def attend(self, layer: int, q: Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]:
        begun = perf_counter()
        out, lse = self._session.attend(layer, q, end=end)
        self.seconds.append(perf_counter() - begun)
        self._last = layer, q, end, out
        return out, lse

    def moved(self) -> float:
        """The last attend step asked again: the largest difference between both answers."""
        assert self._last is not None
        layer, q, end, out = self._last
        return float((self._session.attend(layer, q, end=end)[0] - out).abs().max())


class Decoder:
    """One answer, in parts."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, session: RemoteSession, prompt: str
    ) -> None:
        """`prompt` comes right behind the session's tokens. `model` uses the attention of a StoreCache."""
        self._model, self._tokenizer = model, tokenizer
        self.session = TimedSession(session)
        self._cache = StoreCache(self.session, model)
        self._next = tokenizer(prompt, return_tensors="pt").input_ids
        self._tokens: list[int] = []

    def decode(self, tokens: int, progress: Callable[[int], None], *, whole: bool) -> Answered:
        """At most `tokens` more, fewer where the answer ends, which it may only if this is the `whole` rest."""
        begun, first_token, first_step = perf_counter(), len(self._tokens), len(self.session.seconds)
        end_token = self._tokenizer.eos_token_id
        while len(self._tokens) < first_token + tokens and self._tokens[-1:] != [end_token]:
            logits = self._model(self._next, past_key_values=self._cache, logits_to_keep=1).logits[:, -1]
            if not whole:
                logits[:, end_token] = float("-inf")
            self._next = logits.argmax(-1, keepdim=True)
            self._tokens.append(int(self._next))
            progress(len(self._tokens))
        return Answered(
            text=str(self._tokenizer.decode(self._tokens, skip_special_tokens=True)),
            tokens=len(self._tokens) - first_token,
            seconds=perf_counter() - begun,
            attend_seconds=self.session.seconds[first_step:],
        )
