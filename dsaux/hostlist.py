"""Slurm's short forms written out: `n[1-2,5]` for hosts and `2(x3),1` for counts. Used by `dsaux.launchers`."""

from __future__ import annotations

import itertools
import re

from dsaux.config_rules import ConfigError

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_HOSTS = 100_000


def expand_hosts(text: str) -> list[str]:
    """Host names of a list, in its order: `r[1-2]n[08-09],login` gives r1n08, r1n09, r2n08, r2n09, login.

    Raises:
        ConfigError: if the text is no list of hosts.
    """
    hosts: list[str] = []
    for item in _split(text):
        # Even pieces are text, odd ones what stood in brackets.
        pieces = [
            [piece] if number % 2 == 0 else _expand_range(piece, text)
            for number, piece in enumerate(re.split(r"\[([^\[\]]*)\]", item))
        ]
        hosts += ["".join(parts) for parts in itertools.product(*pieces)]
    if not hosts or any(not host or "[" in host or "]" in host for host in hosts):
        raise ConfigError(f"{text!r} is no list of hosts such as n[1-2,5]. Leave Slurm's variables as srun sets them.")
    return hosts


def expand_counts(text: str) -> list[int]:
    """Tasks of each node: `2(x3),1` gives 2, 2, 2, 1.

    Raises:
        ConfigError: if the text has another form.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = _COUNT.fullmatch(item)
        if match is None:
            raise ConfigError(
                f"{text!r} is no list of counts such as 2(x3),1. Leave Slurm's variables as srun sets them."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    return [item for item in re.split(r",(?![^\[]*\])", text.strip()) if item]


def _expand_range(piece: str, text: str) -> list[str]:
    """`08-10,12` gives 08, 09, 10, 12: numbers keep the width of the first."""
    numbers: list[str] = []
    for item in piece.split(","):
        match = _RANGE.fullmatch(item)
        if match is None or not 0 <= int(match[2] or match[1]) - int(match[1]) < _MOST_HOSTS:
            raise ConfigError(
                f"{text!r} has {item!r} in brackets, which is no range such as 1-3. Give a list of hosts."
            )
        width = len(match[1])
        numbers += [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers
