"""Which series and labels a PromQL expression reads."""

import re
from dataclasses import dataclass

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"\{([^}]*)\}")
WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""


@dataclass(frozen=True)
class Read:
    series: frozenset[str]
    labels: frozenset[str]


def read_by(expression: str) -> Read:
    """Names that are neither functions, keywords nor labels, and labels of selectors and groupings without SCRAPED."""
    text = re.sub(r'"[^"]*"', '""', expression)
    labels = {match for group in GROUPING.findall(text) for match in NAME.findall(group)}
    labels |= {each for group in SELECTOR.findall(text) for each in NAME.findall(group)}
    text = SELECTOR.sub("", GROUPING.sub("", text))
    text = re.sub(r"\[[^]]*\]|\b\d+[smhdwy]\b", "", text)
    found = {match[0] for match in NAME.finditer(text) if not text[match.end() :].lstrip().startswith("(")}
    aggregations = {"sum", "max", "min", "avg", "count"}
    return Read(frozenset(found - WORDS - aggregations), frozenset(labels - SCRAPED))
