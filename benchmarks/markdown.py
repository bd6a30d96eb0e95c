"""Parts that the generated tables have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from seeds import Row, read_lines


def environment_line(environments: Sequence[Row]) -> str:
    """Machine, versions and days of some measurements."""
    machines = sorted({f"{env['cores']} cores of {env['cpu']}, {gpus_text(env['gpus'])}" for env in environments})
    kinds = ("torch", "deepspeed", "dali")
    versions = sorted(
        {
            ", ".join(f"{kind} {env['versions'][kind]}" for kind in kinds if env["versions"][kind])
            for env in environments
        }
    )
    days = sorted({env["started_utc"][:10] for env in environments})
    return f"{'; '.join(machines)}; {'; '.join(versions)}; measured {' and '.join(days)}."


def gpus_text(gpus: Sequence[str]) -> str:
    """GPUs in words."""
    return f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"


def table_line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def listed(values: Iterable[int]) -> str:
    """Different values in order."""
    return ", ".join(map(str, sorted(set(values))))


def per_cents(shares: Iterable[float]) -> str:
    """Shares in per cent, without the sign."""
    return ", ".join(f"{100 * share:.1f}" for share in shares)


def data_of(path: Path, *, command: str) -> list[Row]:
    """The lines of a file of results.

    Raises:
        ValueError: if there are none.
    """
    rows = read_lines(path)
    if not rows:
        raise ValueError(f"{path.parent.name}/{path.name} is missing or empty; measure with {command}.")
    return rows
