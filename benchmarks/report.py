"""Write the tables of README.md, docs/ and ds_configs/ from what was measured and from the configuration's description.

python benchmarks/report.py            put the tables between their markers; say which ones lack markers or data
python benchmarks/report.py --check    fail if a document says anything else, or a table lacks its markers or data
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import choices
import device_forecast
import device_tables
import duel_tables
from config_table import config_table
from markdown import data_of, environment_line, listed, per_cents, table_line
from seeds import Row, changes_of, read_lines

from dsaux.config import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
SEEDS, WAITS, CHOICES, INPUT, DECODE = (
    RESULTS / f"{name}.jsonl" for name in ("seeds", "waits", "choices", "input", "decode")
)

SEEDS_SUITES = ("quickstart", "3 stages", "4 stages, uneven")
ACCURACY_SUITES = (
    "resnet20, 3 stages",
    "resnet20, 3 stages, twice as long",
    "resnet32, 5 stages",
    "resnet32, 5 stages, twice as long",
    "resnet110, 3 stages",
)
LOSS_SUITES = ("ViT, 3 stages", "GPT, 3 stages")
"""Which suites of seeds.jsonl belong to which table."""


@dataclass(frozen=True)
class TableOfDocument:
    """One generated table.

    Attributes:
        document: path of the document below the repository's root.
        make: makes the table's text; raises ValueError where data are missing.
    """

    document: str
    make: Callable[[], str]


def main() -> int:
    """Write or check the documents; 1 if one should be other than it is, or cannot be checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is not up to date")
    arguments = parser.parse_args()
    problems = []
    for document in dict.fromkeys(table.document for table in TABLES.values()):
        path = ROOT / document
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        new, lacking = with_tables(text, document=document)
        problems += lacking
        if new == text:
            continue
        if arguments.check:
            problems.append(f"{document} has a table that is not what its data say. Run: python benchmarks/report.py")
        else:
            path.write_text(new, encoding="utf-8")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems and arguments.check else 0


def with_tables(text: str, *, document: str) -> tuple[str, list[str]]:
    """A document's text with its tables as they should be, and what keeps a table from being made."""
    lacking = []
    for name, table in TABLES.items():
        if table.document != document:
            continue
        try:
            text = between_markers(text, name=name, table=table.make(), document=document)
        except ValueError as error:
            lacking.append(f"table {name} of {document}: {error}")
    return text, lacking


def between_markers(text: str, *, name: str, table: str, document: str = "README.md") -> str:
    """`text` with `table` between the two comments that name it.

    Raises:
        ValueError: if a marker is missing.
    """
    start, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{document} lacks the markers {start.strip()} and {end}; put them where the table belongs.")
    return f"{before}{start}{table}\n{end}{after}"


# ---- the tables -----------------------------------------------------------------------------------------------------


def seeds_table() -> str:
    """One line for each suite of the first measurements, configuration and number of stages: mean, spread and n."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    rows = suite_rows(SEEDS_SUITES)
    for row in rows:
        final = row["final"]
        groups.setdefault((row["suite"], final["stages"], final["method"]), []).append(row)
    lines = [
        "| suite | stages | cut at layer | schedule | test accuracy, mean (range) | n | samples/s, median (range) "
        "| whole command, median | mismatch per boundary |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (suite, stages, method), members in sorted(groups.items(), key=lambda item: SEEDS_SUITES.index(item[0][0])):
        finals = [member["final"] for member in members]
        speed = [final["train_samples_per_s"] for final in finals]
        command_s = statistics.median(member["command_wall_s"] for member in members)
        # More ranks than cores, or other work beside: times would say how the cores were shared, not how fast it is.
        has_cores = all(
            member["num_processes"] <= member["environment"]["cores"] and not member.get("machine_was_busy", False)
            for member in members
        )
        cells = [
            suite,
            str(stages),
            ", ".join(sorted({str(final["bounds"][1:-1]) for final in finals})),
            f"`{method}`",
            mean_and_range([final["test_accuracy"] for final in finals]),
            str(len(finals)),
            f"{statistics.median(speed):.0f} ({min(speed):.0f} to {max(speed):.0f})" if has_cores else "-",
            f"{command_s:.0f} s" if has_cores else "-",
            mean_mismatch(finals),
        ]
        lines.append(table_line(cells))
    return "\n".join([*lines, "", machine_line(rows)])


def accuracy_table() -> str:
    """One line for each suite and configuration, with the difference to the suite's 1f1b runs, seed by seed."""
    rows = suite_rows(ACCURACY_SUITES)
    lines = [
        "| suite | method | configuration | changed in it | test accuracy, mean (range) | n "
        "| difference to 1f1b ± its standard error | epochs | of them exact | mismatch per boundary "
        "| adjoint/coupling per boundary |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for suite in ACCURACY_SUITES:
        cases: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            if row["suite"] == suite:
                cases.setdefault((row["final"]["method"], row["case"], listed_changes(row)), []).append(row["final"])
        twins = [finals for (method, _, _), finals in cases.items() if method == "1f1b"]
        if len(twins) > 1:
            raise ValueError(f"suite {suite} has {len(twins)} configurations with method 1f1b; keep one as the twin.")
        for (method, case, changed), finals in cases.items():
            cells = [
                suite,
                f"`{method}`",
                f"`{case}`",
                changed,
                mean_and_range([final["test_accuracy"] for final in finals]),
                str(len(finals)),
                paired_difference(finals, twins[0]) if twins and method != "1f1b" else "-",
                listed({final["epochs"] for final in finals}),
                listed({final["exact_epochs"] for final in finals}),
                mean_mismatch(finals),
                boundary_means(finals, "boundary_adjoint", digits=2),
            ]
            lines.append(table_line(cells))
    return "\n".join([*lines, "", machine_line(rows)])


def losses_table() -> str:
    """One line for each suite and configuration: test loss, and by how much it is above the suite's 1f1b runs."""
    rows = suite_rows(LOSS_SUITES)
    lines = [
        "| suite | method | configuration | changed in it | test loss, mean (range) | above 1f1b, seed by seed "
        "| test top-1, mean (range) | n | steps | exact epochs | mismatch per boundary "
        "| adjoint/coupling per boundary |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for suite in LOSS_SUITES:
        cases: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            if row["suite"] == suite:
                cases.setdefault((row["final"]["method"], row["case"], listed_changes(row)), []).append(row["final"])
        twin = {
            final["seed"]: final["test_loss"]
            for (method, _, _), finals in cases.items()
            for final in finals
            if method == "1f1b"
        }
        for (method, case, changed), finals in cases.items():
            above = [final["test_loss"] / twin[final["seed"]] - 1 for final in finals if final["seed"] in twin]
            cells = [
                suite,
                f"`{method}`",
                f"`{case}`",
                changed,
                mean_and_range([final["test_loss"] for final in finals]),
                "-" if method == "1f1b" else ", ".join(f"{100 * share:+.1f} %" for share in above) or "-",
                mean_and_range([final["test_accuracy"] for final in finals]),
                str(len(finals)),
                listed({final["steps"] for final in finals}),
                listed({final["exact_epochs"] for final in finals}),
                mean_mismatch(finals),
                boundary_means(finals, "boundary_adjoint", digits=2),
            ]
            lines.append(table_line(cells))
    return "\n".join([*lines, "", machine_line(rows)])


def listed_changes(row: Row) -> str:
    """What a run changed in its configuration, for a cell; "-" for nothing."""
    return ", ".join(f"`{change}`" for change in changes_of(row)) or "-"


def waits_table() -> str:
    """One line for each schedule and setting of the sleeping stages, the newest measurement of each."""
    keys = ("stages", "micro_batches", "forward_ms", "backward_ms", "jitter", "schedule")
    newest = {tuple(row[key] for key in keys): row for row in data_of(WAITS, command="benchmarks/waits.py")}
    lines = [
        "| schedule | stages | micro-batches | sleeps, ms | jitter | busy per rank in %, median | lowest to highest "
        "| of it AuxNet | waits | busy in theory | step in ms, median (range) | blocks |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in newest.values():
        middle, least, most = (1000 * value for value in row["step_s"])
        low, high = min(rank[1] for rank in row["busy"]), max(rank[2] for rank in row["busy"])
        cells = [
            f"`{row['schedule']}`",
            str(row["stages"]),
            str(row["micro_batches"]),
            f"{row['forward_ms']:g} + {row['backward_ms']:g}",
            f"{row['jitter']:g}",
            per_cents(rank[0] for rank in row["busy"]),
            f"{100 * low:.1f} to {100 * high:.1f}",
            per_cents(row["aux_share"]) if any(row["aux_share"]) else "-",
            per_cents(row["wait_share"]) or "-",
            f"{100 * row['theory_busy']:.1f}",
            f"{middle:.0f} ({least:.0f} to {most:.0f})",
            f"{row['n']} of {row['steps']} steps",
        ]
        lines.append(table_line(cells))
    return "\n".join([*lines, "", environment_line([row["environment"] for row in newest.values()])])


def choices_table() -> str:
    """One line for each configuration, group and value."""
    rows = data_of(CHOICES, command="benchmarks/choices.py")
    lines = [
        "| configuration | key | value | test accuracy, mean (range) | n | mismatch per boundary | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        for group in choices.GROUPS:
            for value, members in choices.points(own, group):
                finals = [row["final"] for row in members if not row["failed"]]
                errors = [row["error"] for row in members if row["failed"]]
                is_base = value == members[0]["base"][group]
                cells = [
                    f"`{case}`",
                    f"`{group}`",
                    f"{value_text(value)} (base)" if is_base else value_text(value),
                    mean_and_range([final["test_accuracy"] for final in finals]) if finals else "-",
                    str(len(finals)),
                    mean_mismatch(finals) if finals else "-",
                    f"{len(errors)}: {errors[-1]}".replace("|", "\\|") if errors else "-",
                ]
                lines.append(table_line(cells))
    return "\n".join([*lines, "", machine_line([row for row in rows if not row["failed"]])])


def input_table() -> str:
    """One line for each device, data set and pipeline, the newest measurement of each."""
    rows = data_of(INPUT, command="benchmarks/input.py")
    newest = {(row.get("device", "cpu"), row["dataset"], row["pipeline"]): row for row in rows}
    lines = [
        "| data set | pipeline | batches on | samples/s, median (range) | batch | threads | blocks |",
        "|---|---|---|---|---|---|---|",
    ]
    for (device, dataset, pipeline), row in sorted(newest.items()):
        cells = [
            f"`{dataset}`",
            f"`{pipeline}`",
            {"cpu": "CPU", "cuda": "GPU"}[device],
            speed_text(row["samples_per_s"]),
            str(row["batch_size"]),
            str(row["threads"]),
            f"{row['n']} of {row['batches']} batches",
        ]
        lines.append(table_line(cells))
    return "\n".join([*lines, "", environment_line([row["environment"] for row in newest.values()])])


def decode_table() -> str:
    """One line for each kind of images and way to make a host's batches, the newest measurement of each."""
    keys = ("ranks", "loader", "case", "decode")
    newest = {tuple(row[key] for key in keys): row for row in data_of(DECODE, command="benchmarks/decode.py")}
    lines = [
        "| images | `dsaux.data.decode` | ranks | loader | samples/s, median (range) "
        "| CPU s per 1,000 samples, all ranks |",
        "|---|---|---|---|---|---|",
    ]
    for row in newest.values():
        cells = [
            row["case"],
            f"`{row['decode']}`",
            str(row["ranks"]),
            f"`{row['loader']}`",
            speed_text(row["samples_per_s"]),
            f"{row['cpu_s_per_1000']:.2f}",
        ]
        lines.append(table_line(cells))
    return "\n".join([*lines, "", environment_line([row["environment"] for row in newest.values()])])


# ---- parts ----------------------------------------------------------------------------------------------------------


def suite_rows(suites: Sequence[str]) -> list[Row]:
    """The lines of seeds.jsonl that belong to these suites.

    Raises:
        ValueError: if a suite has no line, or the file has a suite that belongs to no table.
    """
    rows = data_of(SEEDS, command="benchmarks/seeds.py")
    strange = sorted({row["suite"] for row in rows} - {*SEEDS_SUITES, *ACCURACY_SUITES, *LOSS_SUITES})
    if strange:
        raise ValueError(
            f"{SEEDS.name} has the suite {strange[0]!r}, which belongs to no table; add it to SEEDS_SUITES, "
            "ACCURACY_SUITES or LOSS_SUITES in benchmarks/report.py."
        )
    absent = [suite for suite in suites if all(row["suite"] != suite for row in rows)]
    if absent:
        raise ValueError(f"{SEEDS.name} has no line of suite {absent[0]!r}; measure it with benchmarks/seeds.py.")
    return [row for row in rows if row["suite"] in suites]


def paired_difference(finals: Iterable[Row], twins: Iterable[Row]) -> str:
    """Mean difference of test accuracy over the seeds that both have, and its standard error; a dash without a pair."""
    twin = {final["seed"]: final["test_accuracy"] for final in twins}
    differences = [final["test_accuracy"] - twin[final["seed"]] for final in finals if final["seed"] in twin]
    if not differences:
        return "-"
    if len(differences) == 1:
        return f"{differences[0]:+.3f} (one pair)"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = round(statistics.mean(differences), 3) + 0.0  # no "-0.000"
    return f"{mean:+.3f} ± {error:.3f}"


def mean_and_range(values: Sequence[float]) -> str:
    """Mean, smallest and largest value."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def mean_mismatch(finals: Sequence[Row]) -> str:
    """Mean over the seeds of the last relative mismatch of each boundary; a dash for 1f1b."""
    return boundary_means(finals, "boundary_mismatch", digits=3)


def boundary_means(finals: Sequence[Row], key: str, *, digits: int) -> str:
    """Mean over the runs of a figure of each boundary; a dash where a run has none, as lines of older versions."""
    columns = zip(*(final.get(key) or () for final in finals), strict=False)
    means = (statistics.mean(value for value in column if value is not None) for column in columns if any_known(column))
    return ", ".join(f"{mean:.{digits}f}" for mean in means) or "-"


def any_known(values: Iterable[float | None]) -> bool:
    """Whether one of the values is a number; NaN is null in a file of results."""
    return any(value is not None for value in values)


def machine_line(rows: Sequence[Row]) -> str:
    """Seeds, machine and versions of some training runs."""
    seeds = {row["final"]["seed"] for row in rows}
    line = environment_line([row["environment"] for row in rows])
    return f"Seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}; {line}" if rows else "No run has ended."


def speed_text(speeds: Sequence[float]) -> str:
    """Median, least and greatest samples per second."""
    middle, low, high = speeds
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def value_text(value: object) -> str:
    """A value as the configuration writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


TABLES: dict[str, TableOfDocument] = {
    "configuration": TableOfDocument("README.md", markdown_table),
    "seeds": TableOfDocument("README.md", seeds_table),
    "accuracy": TableOfDocument("README.md", accuracy_table),
    "waits": TableOfDocument("README.md", waits_table),
    "choices": TableOfDocument("docs/choosing.md", choices_table),
    "tokens": TableOfDocument("docs/your_model.md", losses_table),
    "input": TableOfDocument("docs/data.md", input_table),
    "decode": TableOfDocument("docs/data.md", decode_table),
    "configurations": TableOfDocument("ds_configs/README.md", lambda: config_table(read_lines(SEEDS))),
    "device": TableOfDocument("docs/benchmarks.md", device_tables.device_table),
    "device-forecast": TableOfDocument(
        "docs/benchmarks.md", lambda: device_forecast.forecast_table(device_tables.RESULTS)
    ),
    **{name: TableOfDocument("docs/benchmarks.md", make) for name, make in duel_tables.TABLES.items()},
}

if __name__ == "__main__":
    sys.exit(main())
