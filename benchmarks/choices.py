"""The curves behind the guide: one choice changed at a time, each against the same base, over several seeds.

    python benchmarks/choices.py --ds_config ds_configs/choices.json --num_gpus 3 --only beta rho

The configuration as it stands is the base; its runs serve all groups, and a value that it has already is not run again.
A run that fails on the way (a loss that is no number, say) is a line too: the guide shows where the method ends. Stop
and start at will: a run whose line is in the file is skipped. `benchmarks/report.py` makes a table of the lines,
`benchmarks/plot.py` a figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seeds
from seeds import Row

from dsaux.config import load_config

ROOT = Path(__file__).resolve().parent.parent
GROUPS: dict[str, tuple[Any, ...]] = {
    "beta": (1, 3, 10, 30, 100),
    "rho": (0.1, 1, 10),
    "gamma": (0, 0.5, 1, 2),
    "depth": (1, 2),
    "width": (0.25, 0.5, 1, 2),
    "segment": ("light", "full"),
    "transport": ("full", "bf16"),
    "overlap": (False, True),
}
"""Keys of `dsaux.aux` and the values to try."""
ONLY_AL = ("transport", "overlap")
BASE = "base"
EXIT_FAILED = 1
"""Exit code of train.py for a run that failed on the way; any other is the machine's fault or the user's."""


@dataclass(frozen=True)
class Choice:
    """One point of the grid: a key of `dsaux.aux` and its value; the base has no value."""

    group: str
    value: Any

    @property
    def overrides(self) -> list[str]:
        """For `--set`."""
        return [] if self.group == BASE else [f"dsaux.aux.{self.group}={json.dumps(self.value)}"]


@dataclass(frozen=True)
class Study:
    """One configuration and its grid.

    Attributes:
        config: the file.
        overrides: further ones, for the base and all points.
        base: the base's value in each group.
        choices: the grid, the base first.
        digest: of the file's content and the overrides.
    """

    config: Path
    overrides: tuple[str, ...]
    base: Row
    choices: tuple[Choice, ...]
    digest: str


def main() -> int:
    """Run what is missing, seed by seed; 1 if a run could not be measured, 2 for wrong input."""
    arguments = parse_arguments()
    try:
        studies = [read_study(config, arguments.set, only=arguments.only) for config in arguments.ds_config]
        for study in studies:
            missing(study, seeds.read_lines(arguments.out), seed=arguments.seeds[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lost = 0
    # Seeds outside: the whole grid has one seed before any point has two.
    for seed in arguments.seeds:
        for study in studies:
            for choice in missing(study, seeds.read_lines(arguments.out), seed=seed):
                row = measure(study, choice, seed=seed, num_processes=arguments.num_gpus)
                if row["failed"] and row["exit_code"] != EXIT_FAILED:
                    lost += 1
                    continue
                seeds.append_line(arguments.out, row)
                result = row["error"] if row["failed"] else f"test accuracy {row['final']['test_accuracy']:.4f}"
                print(f"{row['case']}, {choice.group} {choice.value}, seed {seed}: {result}", flush=True)
    return 1 if lost else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [ROOT / "ds_configs/choices.json"]
    parser.add_argument("--ds_config", nargs="+", type=Path, default=default, metavar="FILE", help="the bases")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="values of dsaux.run.seed (0 1 2)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help="groups (all)")
    parser.add_argument("--num_gpus", type=int, default=3, help="processes to start (3)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides for the base and all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/choices.jsonl", help="file to append to")
    return parser.parse_args()


def read_study(config: Path, overrides: Sequence[str], *, only: Iterable[str]) -> Study:
    """Check a configuration and make its grid; says on the terminal which groups have no meaning for its schedule."""
    settings = load_config(config, overrides=overrides).dsaux
    base = {group: getattr(settings.aux, group) for group in GROUPS}
    groups = list(only)
    if settings.pipeline.schedule != "al":
        dropped = [group for group in groups if group in ONLY_AL]
        groups = [group for group in groups if group not in ONLY_AL]
        if dropped:
            print(f"{config.stem}: {', '.join(dropped)} left out, which only schedule al has.", file=sys.stderr)
    content = json.dumps([json.loads(config.read_text(encoding="utf-8")), list(overrides)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Study(config, tuple(overrides), base, tuple(grid(base, groups)), digest)


def grid(base: Row, groups: Iterable[str]) -> list[Choice]:
    """The base once, then all values of the groups that are not the base's own."""
    others = [Choice(group, value) for group in groups for value in GROUPS[group] if value != base[group]]
    return [Choice(BASE, None), *others]


def missing(study: Study, rows: Iterable[Row], *, seed: int) -> list[Choice]:
    """The points of a study's grid that have no line for this seed.

    Raises:
        ValueError: if the file has lines of another configuration of the same name.
    """
    own = [row for row in rows if row["case"] == study.config.stem]
    if any(row["config_digest"] != study.digest for row in own):
        raise ValueError(
            f"the results hold lines of another {study.config.stem} than {study.config} with these overrides. Give the "
            "changed configuration another file name, or --out another file."
        )
    done = {(row["group"], row["value"]) for row in own if row["seed"] == seed}
    return [choice for choice in study.choices if (choice.group, choice.value) not in done]


def measure(study: Study, choice: Choice, *, seed: int, num_processes: int) -> Row:
    """Train one point with one seed; returns its line."""
    overrides = [f"dsaux.run.seed={seed}", *study.overrides, *choice.overrides]
    row = seeds.run(study.config, num_processes=num_processes, overrides=overrides, suite="choices")
    point = {"group": choice.group, "value": choice.value, "seed": seed}
    return {**point, "base": study.base, "config_digest": study.digest, **row}


def points(rows: Sequence[Row], group: str) -> list[tuple[Any, list[Row]]]:
    """The lines of a group by value, in the order of `GROUPS`, the base's lines at the base's value.

    Args:
        rows: lines of one configuration.
        group: a name in `GROUPS`.

    Returns:
        (value, its lines); empty if the group has no lines but the base's.
    """
    if all(row["group"] != group for row in rows):
        return []
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if row["group"] in (group, BASE):
            found.setdefault(row["base"][group] if row["group"] == BASE else row["value"], []).append(row)
    order = {value: place for place, value in enumerate(GROUPS[group])}
    numbers = all(isinstance(value, (int, float)) for value in found)
    return sorted(found.items(), key=lambda item: item[0] if numbers else order.get(item[0], len(order)))


if __name__ == "__main__":
    sys.exit(main())
