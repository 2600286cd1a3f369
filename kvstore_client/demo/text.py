"""The text that the demo shares: English docstrings of Python's standard library, or a file."""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

MODULES = ("textwrap", "shutil", "json", "glob", "heapq", "statistics", "functools", "contextlib", "tempfile")
DOCSTRING_CHARS_MIN = 80


@dataclass(frozen=True)
class SharedText:
    """A text and what the two workers ask about it."""

    name: str
    body: str
    questions: tuple[str, str]
    is_default: bool


def shared_text(file: Path | None) -> SharedText:
    """The text of `file`, or the default."""
    if file is not None:
        questions = ("What is the text above about?", "Summarise the text above in two sentences.")
        return SharedText(file.name, file.read_text(encoding="utf-8"), questions, is_default=False)
    questions = ("What is shutil.rmtree for?", "What does shutil.copytree do?")
    return SharedText("docstrings of the standard library", _docstrings(), questions, is_default=True)


def _docstrings() -> str:
    parts: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"Module {name}. {inspect.getdoc(module)}")
        members = [(member, getattr(module, member)) for member in module.__all__]
        documented = [(member, inspect.getdoc(value) or "") for member, value in members if inspect.isfunction(value)]
        parts += [f"{name}.{member}: {doc}" for member, doc in documented if len(doc) > DOCSTRING_CHARS_MIN]
    return "\n\n".join(parts)
