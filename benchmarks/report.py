"""Write the tables of README.md from what was measured and from the configuration's own description.

python benchmarks/report.py            put the tables between their markers
python benchmarks/report.py --check    fail if README.md says anything else
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsaux.config import markdown_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SEEDS = ROOT / "benchmarks/results/seeds.jsonl"

Row = dict[str, Any]


def main() -> int:
    """Write or check README.md; 1 if it should be other than it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is not up to date")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    new = text
    for name, table in TABLES.items():
        new = between_markers(new, name=name, table=table())
    if new == text:
        return 0
    if arguments.check:
        print("README.md has a table that is not what its data say. Run: python benchmarks/report.py", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    return 0


def between_markers(text: str, *, name: str, table: str) -> str:
    """`text` with `table` between the two comments that name it.

    Raises:
        ValueError: if a marker is missing.
    """
    start, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README.md lacks the markers {start.strip()} and {end}; put them where the table belongs.")
    return f"{before}{start}{table}\n{end}{after}"


def seeds_table() -> str:
    """One line for each suite, configuration and number of stages: mean, spread and n."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    rows = [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        final = row["final"]
        groups.setdefault((row["suite"], final["stages"], final["method"]), []).append(row)
    lines = [
        "| suite | stages | cut at layer | schedule | test accuracy, mean (range) | n | samples/s, median (range) "
        "| whole command, median | mismatch per boundary |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (suite, stages, method), members in groups.items():
        finals = [member["final"] for member in members]
        accuracy = [final["test_accuracy"] for final in finals]
        speed = [final["train_samples_per_s"] for final in finals]
        command_s = statistics.median(member["command_wall_s"] for member in members)
        # More ranks than cores: times would say how the cores were shared, not how fast the schedule is.
        has_cores = all(member["num_processes"] <= member["environment"]["cores"] for member in members)
        cells = [
            suite,
            str(stages),
            ", ".join(sorted({str(final["bounds"][1:-1]) for final in finals})),
            f"`{method}`",
            f"{statistics.mean(accuracy):.3f} ({min(accuracy):.3f} to {max(accuracy):.3f})",
            str(len(finals)),
            f"{statistics.median(speed):.0f} ({min(speed):.0f} to {max(speed):.0f})" if has_cores else "-",
            f"{command_s:.0f} s" if has_cores else "-",
            mean_mismatch(finals),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", machine_line(rows)])


def mean_mismatch(finals: list[Row]) -> str:
    """Mean over the seeds of the last relative mismatch of each boundary; a dash for 1f1b."""
    columns = zip(*(final["boundary_mismatch"] for final in finals), strict=True)
    return ", ".join(f"{statistics.mean(column):.3f}" for column in columns) or "-"


def machine_line(rows: list[Row]) -> str:
    """Machine and versions of the measurements, and the seeds."""
    environments = [row["environment"] for row in rows]
    machines = sorted({f"{env['cores']} cores of {env['cpu']}, no GPU" for env in environments if not env["gpus"]})
    kinds = ("torch", "deepspeed", "dali")
    versions = sorted({", ".join(f"{kind} {env['versions'][kind]}" for kind in kinds) for env in environments})
    seeds = sorted({row["final"]["seed"] for row in rows})
    days = sorted({env["started_utc"][:10] for env in environments})
    return (
        f"Seeds {', '.join(map(str, seeds))}; {'; '.join(machines)}; {'; '.join(versions)}; "
        f"measured {' and '.join(days)}."
    )


TABLES: dict[str, Callable[[], str]] = {"configuration": markdown_table, "seeds": seeds_table}

if __name__ == "__main__":
    sys.exit(main())
