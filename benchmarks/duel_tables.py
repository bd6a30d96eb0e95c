"""The tables of docs/benchmarks.md: who is how fast, from the lines that `benchmarks/run.py` has written."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from markdown import data_of, environment_line, table_line
from seeds import Row, read_lines

RESULTS = Path(__file__).resolve().parent / "results"
EXACT_PIPELINE = "deepspeed-1f1b"
"""Whom the others are compared with."""
PREDICTED_WITHIN = 0.15
"""How far a prediction may be off."""


def newest_rows(suite: str) -> list[Row]:
    """The newest line of each case, contestant, number of threads and micro-batches, and link; without failed ones.

    Raises:
        ValueError: if there are none.
    """
    keys = ("case", "link_mbit", "contestant", "ranks", "threads", "micro_batches")
    rows = data_of(RESULTS / f"{suite}.jsonl", command=f"benchmarks/run.py --suite {suite}")
    newest = {tuple(row.get(key) for key in keys): row for row in rows}
    return [row for row in newest.values() if row["failed"] is None]


def sleep_table() -> str:
    """For each number of ranks and micro-batches: idle share and throughput of all contestants."""
    rows = newest_rows("sleep")
    heads = (
        "ranks",
        "peers' M",
        "contestant",
        "M",
        "samples/s, median (range)",
        "times 1F1B",
        "idle",
        "idle, in theory",
    )
    lines = _head(heads)
    for case, members in sorted(rows_by_case(rows), key=lambda named: _ranks_and_peers(named[0])):
        base = best_of(member for member in members if member["contestant"] == EXACT_PIPELINE)
        ranks, peers = _ranks_and_peers(case)
        for row in members:
            cells = [
                str(ranks),
                str(peers),
                f"`{row['contestant']}`",
                str(row["micro_batches"]),
                _speed(row),
                _times(row, base),
                f"{100 * row['idle_share']:.1f} %",
                _theory(row),
            ]
            lines.append(table_line(cells))
    return "\n".join([*lines, "", _measured(rows)])


def compute_best_table() -> str:
    """For each case every contestant at its best number of micro-batches."""
    rows = newest_rows("compute")
    heads = (
        "case",
        "contestant",
        "best M",
        "samples/s, median (range)",
        "times 1F1B at its best",
        "times 1F1B at M=1",
        "times one process on one core",
        "idle",
        "MB/step",
        "peak memory of a rank",
        "predicted",
    )
    lines = _head(heads)
    for case, members in rows_by_case(rows):
        exact = [row for row in members if row["contestant"] == EXACT_PIPELINE]
        alone = [row for row in members if row["contestant"] == "one-process" and row["threads"] == 1]
        for group in _contestants(members):
            row = best_of(group)
            cells = [
                case,
                _name(row),
                str(row["micro_batches"]),
                _speed(row),
                _times(row, best_of(exact)),
                _times(row, best_of(one for one in exact if one["micro_batches"] == 1)),
                _times(row, best_of(alone)),
                f"{100 * row['idle_share']:.0f} %",
                f"{row['bytes_per_step'] / 1e6:.2f}",
                f"{row['peak_memory_bytes'] / 2**20:.0f} MiB",
                _predicted_speed(row),
            ]
            lines.append(table_line(cells))
    return "\n".join([*lines, "", _measured(rows)])


def compute_all_table() -> str:
    """For each case and contestant samples per second at every number of micro-batches."""
    rows = newest_rows("compute")
    counts = sorted({row["micro_batches"] for row in rows})
    lines = _head(("case", "contestant", *(f"M={count}" for count in counts)))
    for case, members in rows_by_case(rows):
        for group in _contestants(members):
            speeds = {row["micro_batches"]: _speed(row) for row in group}
            lines.append(table_line([case, _name(group[0]), *(speeds.get(count, "-") for count in counts)]))
    return "\n".join([*lines, "", _measured(rows)])


def prediction_table() -> str:
    """How far the planner is off, over all lines of a suite and contestant: with gauges, and without."""
    measured = [suite for suite in ("sleep", "compute", "network") if read_lines(RESULTS / f"{suite}.jsonl")]
    rows = [row for suite in measured for row in newest_rows(suite)]
    ratio, within = "predicted / measured, median (range)", "within 15 %"
    lines = _head(("suite", "contestant", "lines", ratio, within, f"without gauges: {ratio}", within))
    suites = dict.fromkeys((row["suite"], row["contestant"]) for row in rows)
    for suite, contestant in suites:
        own = [row for row in rows if (row["suite"], row["contestant"]) == (suite, contestant)]
        own = [row for row in own if row["predicted"]["samples_per_s"]]
        if own:
            once = [row for row in own if "predicted_once" in row]
            cells = [*_accuracy(own, "predicted"), *(_accuracy(once, "predicted_once") if once else ("-", "-"))]
            lines.append(table_line([suite, f"`{contestant}`", str(len(own)), *cells]))
    return "\n".join(lines)


def _accuracy(rows: Sequence[Row], key: str) -> tuple[str, str]:
    """Predicted over measured throughput, and how many are within 15 %."""
    ratios = [row[key]["samples_per_s"] / row["samples_per_s"] for row in rows]
    within = sum(abs(ratio - 1) <= PREDICTED_WITHIN for ratio in ratios)
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return spread, f"{within} of {len(ratios)}"


def network_table() -> str:
    """For each link every contestant at its best number of micro-batches: step time and bytes on the wire."""
    rows = newest_rows("network")
    heads = (
        "case",
        "link, Mbit/s",
        "contestant",
        "best M",
        "step in ms",
        "times its unshaped step",
        "times 1F1B's step",
        "MB/step on the wire",
        "idle",
        "predicted step in ms",
    )
    lines = _head(heads)
    for case, members in rows_by_case(rows):
        links = list(dict.fromkeys(row["link_mbit"] for row in members))
        for link in links:
            own = [row for row in members if row["link_mbit"] == link]
            base = best_of(row for row in own if row["contestant"] == EXACT_PIPELINE)
            for group in _contestants(own):
                row = best_of(group)
                free = best_of(
                    other
                    for other in members
                    if other["link_mbit"] is None and other["contestant"] == row["contestant"]
                )
                predicted = row["predicted"]["samples_per_s"]
                cells = [
                    case,
                    "unshaped" if link is None else f"{link:g}",
                    _name(row),
                    str(row["micro_batches"]),
                    f"{1000 * row['step_s']:.0f}",
                    "-" if free is None else f"{row['step_s'] / free['step_s']:.2f}",
                    "-" if base is None else f"{row['step_s'] / base['step_s']:.2f}",
                    f"{row['bytes_per_step'] / 1e6:.2f}",
                    f"{100 * row['idle_share']:.0f} %",
                    "-" if not predicted else f"{1000 * row['global_batch'] / predicted:.0f}",
                ]
                lines.append(table_line(cells))
    return "\n".join([*lines, "", _measured(rows)])


def race_table() -> str:
    """Accuracy over wall time: how long until the target, and how far at the end."""
    rows = newest_rows("accuracy")
    heads = (
        "contestant",
        "ranks",
        "M",
        "samples/s, median (range)",
        "test accuracy, mean (range)",
        "seconds to the target, by seed",
        "n",
    )
    lines = _head(heads)
    for row in rows:
        accuracy = row["test_accuracy"]
        cells = [
            _name(row),
            str(row["ranks"]),
            str(row["micro_batches"]),
            _speed(row),
            f"{statistics.mean(accuracy):.3f} ({min(accuracy):.3f} to {max(accuracy):.3f})",
            ", ".join("never" if value is None else f"{value:.0f}" for value in row["seconds_to_target"]),
            str(row["n"]),
        ]
        lines.append(table_line(cells))
    targets = ", ".join(sorted({f"{row['target']:.2f}" for row in rows}))
    return "\n".join([*lines, "", f"Target {targets}; {_measured(rows)}"])


# ---- parts ----------------------------------------------------------------------------------------------------------


def _head(heads: Sequence[str]) -> list[str]:
    return [table_line(heads), table_line("---" for _ in heads).replace(" ", "")]


def _ranks_and_peers(case: str) -> tuple[int, int]:
    """Numbers of ranks and of the peers' micro-batches in "p=4, M=16"."""
    ranks, peers = (int(part.partition("=")[2]) for part in case.split(", "))
    return ranks, peers


def rows_by_case(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Lines by the name of their case."""
    return [(case, [row for row in rows if row["case"] == case]) for case in dict.fromkeys(row["case"] for row in rows)]


def _contestants(rows: Sequence[Row]) -> list[list[Row]]:
    def key(row: Row) -> tuple[str, int]:
        return row["contestant"], row["threads"]

    return [[row for row in rows if key(row) == kind] for kind in dict.fromkeys(key(row) for row in rows)]


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Of each contestant the line with the most samples per second."""
    found = (best_of(group) for group in _contestants(rows))
    return [row for row in found if row is not None]


def best_of(rows: Iterable[Row]) -> Row | None:
    """The line with the most samples per second; None of none."""
    return max(rows, key=lambda row: row["samples_per_s"], default=None)


def title_of(row: Row) -> str:
    """The contestant; of a single process with its cores."""
    cores = f", {row['threads']} core{'s' * (row['threads'] > 1)}"
    return str(row["contestant"]) + (cores if row["contestant"] == "one-process" else "")


def _name(row: Row) -> str:
    return f"`{title_of(row)}`"


def _speed(row: Row) -> str:
    low, high = row["spread"]
    return f"{row['samples_per_s']:.1f} ({low:.1f} to {high:.1f})"


def _times(row: Row, base: Row | None) -> str:
    return "-" if base is None else f"{row['samples_per_s'] / base['samples_per_s']:.2f}"


def idle_in_theory(row: Row) -> float | None:
    """Idle share of engines that take no time of their own; None where nothing was predicted."""
    share: float | None = row.get("predicted_once", row["predicted"]).get("idle_share")
    return share


def _theory(row: Row) -> str:
    idle = idle_in_theory(row)
    return "-" if idle is None else f"{100 * idle:.1f} %"


def _predicted_speed(row: Row) -> str:
    speed = row["predicted"]["samples_per_s"]
    return "-" if speed is None else f"{speed:.1f} ({100 * (speed / row['samples_per_s'] - 1):+.0f} %)"


def _measured(rows: Sequence[Row]) -> str:
    blocks = sorted({f"{row['n']} blocks of {row['steps']} steps" for row in rows if "steps" in row})
    busy = any(row.get("machine_was_busy") for row in rows)
    beside = " Other work ran beside some of them." if busy else ""
    what = f"{' and '.join(blocks)}; " if blocks else ""
    return what + environment_line([row["environment"] for row in rows]) + beside


def _once_measured(suite: str, make: Callable[[], str]) -> Callable[[], str]:
    def table() -> str:
        if not read_lines(RESULTS / f"{suite}.jsonl"):
            return f"Not measured yet: `python benchmarks/run.py --suite {suite}`."
        return make()

    return table


TABLES: dict[str, Callable[[], str]] = {
    "sleep": _once_measured("sleep", sleep_table),
    "compute": _once_measured("compute", compute_best_table),
    "compute-all": _once_measured("compute", compute_all_table),
    "network": _once_measured("network", network_table),
    "race": _once_measured("accuracy", race_table),
    "predictions": prediction_table,
}
"""By the name of their markers in docs/benchmarks.md."""
