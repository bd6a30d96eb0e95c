"""Edits of a stage's steps, to plant faults."""

from __future__ import annotations

from typing import Any

from tests.fixed_schedule import Steps


def find(steps: Steps, name: str, number: int = 0) -> tuple[int, int]:
    """Step and index of an instruction; `number` counts those of that name."""
    found = [(s, i) for s, cmds in enumerate(steps) for i, cmd in enumerate(cmds) if cmd.name == name]
    return found[number]


def drop(steps: Steps, name: str, number: int = 0) -> Any:
    """Take an instruction out and return it."""
    step, index = find(steps, name, number)
    return steps[step].pop(index)


def swap(steps: Steps, one: str, other: str) -> None:
    """Exchange two instructions."""
    (s, i), (t, j) = find(steps, one), find(steps, other)
    steps[s][i], steps[t][j] = steps[t][j], steps[s][i]


def put(steps: Steps, name: str, cmd: Any, number: int = 0) -> None:
    """Replace an instruction."""
    step, index = find(steps, name, number)
    steps[step][index] = cmd


def put_before(steps: Steps, name: str, cmd: Any, number: int = 0) -> None:
    """Insert an instruction before another."""
    step, index = find(steps, name, number)
    steps[step].insert(index, cmd)


def put_behind(steps: Steps, name: str, cmd: Any, number: int = 0) -> None:
    """Insert an instruction behind another."""
    step, index = find(steps, name, number)
    steps[step].insert(index + 1, cmd)


def move(source: Steps, name: str, target: Steps, *, before: str) -> None:
    """Take an instruction out of one tick and insert it in another, before an instruction there."""
    put_before(target, before, drop(source, name))
