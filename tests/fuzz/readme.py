"""The README's table of the dsaux block, read as a user reads it: which values does it allow?

Written apart from dsaux's own rules. The mutants and the verdict use it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "README.md"


@functools.cache
def readme_table() -> dict[str, str]:
    """The README's table of the dsaux block: key -> what it may hold, in words."""
    rows = re.findall(r"^\| `(dsaux\.[a-z_.0-9]+)` \| (.*?) \| ", README.read_text("utf-8"), re.MULTILINE)
    return dict(rows)


def readme_allows(words: str, value: Any) -> bool:
    """Whether a value is what the README's table says in words; written apart from dsaux's own rules."""
    if words.endswith(" or null"):
        return value is None or readme_allows(words.removesuffix(" or null"), value)
    if words.endswith("or a list of layers"):
        return isinstance(value, list) or value in re.findall(r'"(\w+)"', words)
    if words.startswith("one of "):
        return value in re.findall(r'"(\w+)"', words)
    kinds = {"a string": str, "true or false": bool, "a JSON object {...}": dict}
    if words in kinds:
        return isinstance(value, kinds[words])
    number = re.fullmatch(r"a (whole )?number (>=?) (\d+)(?: and (<=?) (\d+))?", words)
    assert number is not None, f"the README's table has a type that is not known here: {words}"
    whole, sign, low, below, high = number.groups()
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    if not whole and not abs(value) < float("inf"):
        return False
    is_above = value > int(low) if sign == ">" else value >= int(low)
    return is_above and (high is None or value < int(high) or (below == "<=" and value == int(high)))
