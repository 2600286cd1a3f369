"""Whether a recorded history of one session has an order that explains it (Wing and Gong's search, Lowe's memo)."""

from math import inf
from typing import Literal, NamedTuple

State = tuple[str, ...]


class Operation(NamedTuple):
    """What one client called and got, on one clock. `returned` is infinite if the outcome is unknown.

    An append names the number of pieces it expects before its own; its answer is the number after it, or "refused".
    A read's answer is all pieces.
    """

    called: float
    returned: float
    kind: Literal["append", "read"]
    expected: int
    piece: str
    answer: int | str | State | None


def is_linearizable(history: list[Operation]) -> bool:
    operations = sorted(history, key=lambda each: each.called)
    finished = sum(1 << number for number, each in enumerate(operations) if each.returned < inf)
    seen: set[tuple[int, State]] = set()
    stack: list[tuple[int, State]] = [(0, ())]
    while stack:
        done, state = stack.pop()
        if done & finished == finished:
            return True
        waiting = [(number, each) for number, each in enumerate(operations) if not done >> number & 1]
        first_return = min(each.returned for _, each in waiting)
        for number, each in waiting:
            if each.called > first_return:
                break
            answer, after = _applied(state, each)
            key = done | 1 << number, after
            if each.answer in (None, answer) and key not in seen:
                seen.add(key)
                stack.append(key)
    return False


def _applied(state: State, operation: Operation) -> tuple[int | str | State, State]:
    """What the operation answers in this state, and the state after it."""
    if operation.kind == "read":
        return state, state
    if operation.expected < len(state):  # the same piece again is recognised
        same = state[operation.expected] == operation.piece
        return (operation.expected + 1 if same else "refused"), state
    if operation.expected > len(state):
        return "refused", state
    return len(state) + 1, (*state, operation.piece)
