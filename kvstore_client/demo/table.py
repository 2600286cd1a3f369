"""The demo's one table."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from kvstore_client.demo.messages import Agreement, Answered, Compared, Continued, Prefilled
from kvstore_client.demo.setting import KL_MAX, LOSSY_TEXT, RATIO_MAX, TOP1_MIN
from kvstore_client.demo.text import SharedText

MOVED_MAX = 1e-6


@dataclass(frozen=True)
class Outcome:
    """All that was seen."""

    text: SharedText
    prefilled: Prefilled
    begun: Answered
    """Worker 2's answer before the restart."""
    other: Answered
    continued: Continued
    restart_seconds: float
    compared: Compared

    @property
    def ratio(self) -> float:
        return self.prefilled.stored_bytes / self.prefilled.fp16_bytes

    @property
    def top1(self) -> float:
        return self.compared.lossy.agreeing / self.compared.lossy.positions


def broken_promises(outcome: Outcome) -> list[str]:
    """What must hold and did not. How close a lossy codec comes depends on the text: only the default one promises."""
    raw, default = outcome.compared.raw, outcome.text.is_default
    held = {
        "the raw session agrees wherever the two best logits differ by more than 1e-3": raw.decisive_agreeing
        == raw.decisive,
        f"the restarted server answers as before, to {MOVED_MAX}": outcome.continued.attention_moved <= MOVED_MAX,
        f"stored bytes are at most {RATIO_MAX} of fp16": outcome.ratio <= RATIO_MAX,
        f"next-token agreement is at least {TOP1_MIN}": outcome.top1 >= TOP1_MIN or not default,
        f"KL is at most {KL_MAX}": outcome.compared.lossy.kl <= KL_MAX or not default,
    }
    return [promise for promise, kept in held.items() if not kept]


def table_of(outcome: Outcome) -> Table:
    table = Table(title="One context, read once, attended to by three processes through the store", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _measures(outcome):
        table.add_row(name, value)
    table.add_section()
    for worker, words in _answers(outcome):
        table.add_row(worker, words)
    for promise in broken_promises(outcome):
        table.add_row("NOT REACHED", promise, style="red")
    return table


def _measures(outcome: Outcome) -> Iterator[tuple[str, str]]:
    prefilled, lossy = outcome.prefilled, outcome.compared.lossy
    yield "text", f"{outcome.text.name}, {prefilled.tokens:,} tokens, SmolLM2-135M-Instruct in float32"
    yield "codec", LOSSY_TEXT
    yield "fp16 bytes", f"{prefilled.fp16_bytes:,}"
    yield "stored bytes", f"{prefilled.stored_bytes:,} = {outcome.ratio:.3f} of fp16"
    yield "prefill, append", f"{prefilled.prefill_seconds:.1f} s, {prefilled.append_seconds:.1f} s"
    steps = [*outcome.begun.attend_seconds, *outcome.other.attend_seconds, *outcome.continued.answer.attend_seconds]
    p50, p99 = np.percentile(np.asarray(steps) * 1e3, [50, 99])
    yield "attend, one layer", f"p50 {p50:.2f} ms, p99 {p99:.2f} ms over {len(steps):,} steps"
    speeds = [_speed(outcome.begun), _speed(outcome.other), _speed(outcome.continued.answer)]
    yield (
        "tokens/s",
        "workers 2 and 3 together {:.1f} + {:.1f}; worker 2 alone, after the restart {:.1f}".format(*speeds),
    )
    yield "next token, raw", _raw(outcome.compared.raw)
    yield "next token, codec", f"{outcome.top1:.4f} the same over {lossy.positions} positions, KL {lossy.kl:.5f}"
    moved = outcome.continued.attention_moved
    yield (
        "after kill -9",
        f"serves after {outcome.restart_seconds:.1f} s; one query asked again moved by {moved:.1e}",
    )


def _raw(raw: Agreement) -> str:
    share = f"{raw.decisive_agreeing} of {raw.decisive} the same where the two best logits differ by more than 1e-3"
    return f"{share} ({raw.positions} positions), KL {raw.kl:.1e}"


def _answers(outcome: Outcome) -> Iterator[tuple[Text, Text]]:
    first, second = outcome.text.questions
    before, whole = outcome.begun.text, outcome.continued.answer.text
    restart = (" | server killed and restarted | ", "yellow")
    yield Text("worker 2"), Text.assemble((f"{first}\n", "bold"), before, restart, whole[len(before) :])
    yield Text("worker 3"), Text.assemble((f"{second}\n", "bold"), outcome.other.text)


def _speed(answer: Answered) -> float:
    return answer.tokens / answer.seconds
