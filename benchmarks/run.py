"""dsaux against its peers, in one run: starts its own ranks, prints a table, appends lines to benchmarks/results/.

    python benchmarks/run.py --suite sleep      stages that sleep set times: idle share and throughput of the engines
    python benchmarks/run.py --suite compute    real networks on this machine's cores
    python benchmarks/run.py --suite network    two hosts (network namespaces) and a slow cable between them; needs root
    python benchmarks/run.py --suite accuracy   test accuracy over wall time, three seeds
    python benchmarks/run.py --suite device     stages on one GPU (benchmarks/device.py, which has options of its own)

`--quick` measures the smallest case of a suite, in a few minutes: it shows that everything runs, no more. Contestants
of a case take turns block by block, so that a slow minute of the machine meets all of them; warm-up is left out, a
block goes from barrier to barrier. `benchmarks/report.py` makes the tables of docs/benchmarks.md of the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import accuracy
import device
import torch
from cases import Case, cases_of
from crew import preload
from duel import Row, measure_case
from hosts import cable, why_no_cable
from rich.console import Console
from rich.table import Table
from seeds import append_line

from dsaux.environment import describe_environment

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("sleep", "compute", "network", "accuracy", "device")


def main() -> int:
    """Measure a suite; 1 if a contestant failed."""
    arguments = parse_arguments()
    if arguments.suite == "network" and (reason := why_no_cable()) is not None:
        print(f"error: --suite network cannot run here: {reason}.", file=sys.stderr)
        return 2
    out = arguments.out or ROOT / f"benchmarks/results/{arguments.suite}.jsonl"
    if arguments.suite == "accuracy":
        return run_accuracy(out=out, quick=arguments.quick, busy=arguments.busy)
    if arguments.suite == "device":
        return run_device(out=out, quick=arguments.quick, busy=arguments.busy)
    cores = len(os.sched_getaffinity(0))
    cases = cases_of(arguments.suite, quick=arguments.quick, cores=cores)
    if arguments.case:
        whole = [case for case in cases if case.name in arguments.case]  # "p=4, M=1" is a part of "p=4, M=16" as well
        cases = whole or [case for case in cases if any(part in case.name for part in arguments.case)]
    if not cases:
        names = ", ".join(f'"{case.name}"' for case in cases_of(arguments.suite, quick=arguments.quick, cores=cores))
        print(f"error: no case has {' or '.join(arguments.case)} in its name; there are {names}.", file=sys.stderr)
        return 2
    preload()
    failed = 0
    for case in cases:
        failed += run_case(case, out=out, busy=arguments.busy)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=SUITES, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="the smallest case alone, few steps")
    parser.add_argument(
        "--case", nargs="+", default=[], metavar="TEXT", help="only cases with one of these as name, or in it"
    )
    parser.add_argument("--busy", action="store_true", help="other work runs beside: say so in the lines")
    parser.add_argument("--out", type=Path, help="file to append to (benchmarks/results/<suite>.jsonl)")
    return parser.parse_args()


def run_case(case: Case, *, out: Path, busy: bool) -> int:
    """Measure a case, print its table, append its lines; returns how many contestants failed."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    environment = describe_environment(world_size=max(entry.ranks for entry in case.entries))
    environment = {key: value for key, value in environment.items() if key not in ("command", "host")}
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        between = stack.enter_context(cable()) if case.links_mbit else None
        with console.status(case.name) as status:

            def tell(text: str) -> None:
                status.update(text)
                if not console.is_terminal:
                    print(text, flush=True)

            for row in measure_case(case, cable=between, environment=environment, tell=tell):
                rows.append(row)
                append_line(out, {**row, "machine_was_busy": busy})
    for link in case.links_mbit or (None,):
        console.print(case_table(case, [row for row in rows if row["link_mbit"] == link], link_mbit=link))
    failures = {(row["contestant"], row["failed"]) for row in rows if row["failed"] is not None}
    for contestant, error in sorted(failures):
        print(f"{contestant} failed: {error}", file=sys.stderr)
    return len(failures)


def run_accuracy(*, out: Path, quick: bool, busy: bool) -> int:
    """Train all candidates, print a line for each run, append a line for each candidate at the end."""
    lines: dict[str, Row] = {}
    for run, line in accuracy.measure(quick=quick):
        lines[line["contestant"]] = line
        said = run["error"] if run["failed"] else f"test accuracy {run['final']['test_accuracy']:.4f}"
        print(f"{line['contestant']}, {run['overrides'][0]}: {said}, {run['command_wall_s']:.0f} s", flush=True)
    for line in lines.values():
        append_line(out, {**line, "machine_was_busy": busy})
    return 1 if any(line["failed"] for line in lines.values()) else 0


def run_device(*, out: Path, quick: bool, busy: bool) -> int:
    """Measure on a GPU; without one only the smallest size, on the CPU."""
    options = ["--out", str(out), *(["--quick"] if quick else []), *(["--busy"] if busy else [])]
    on_cpu = quick and not torch.cuda.is_available()
    return device.main([*options, "--device", "cpu" if on_cpu else "cuda"])


def case_table(case: Case, rows: Sequence[Row], *, link_mbit: float | None) -> Table:
    """The lines of one case for a terminal."""
    link = "" if not case.links_mbit else f", {'unshaped' if link_mbit is None else f'{link_mbit:g} Mbit/s'}"
    table = Table(title=f"{case.suite}: {case.name}{link}; {case.blocks} blocks of {case.steps} steps")
    for head in ("contestant", "ranks", "M", "samples/s", "lowest to highest", "idle", "MB/step", "peak", "predicted"):
        table.add_column(head, justify="left" if head == "contestant" else "right")
    for row in rows:
        name = row["contestant"] + ("" if row["threads"] == 1 else f" ({row['threads']} cores)")
        start = [name, str(row["ranks"]), str(row["micro_batches"])]
        if row["failed"] is not None:
            table.add_row(*start, "failed")
            continue
        low, high = row["spread"]
        predicted = row["predicted"]["samples_per_s"]
        off = "" if predicted is None else f"{predicted:,.1f} ({100 * (predicted / row['samples_per_s'] - 1):+.0f} %)"
        table.add_row(
            *start,
            f"{row['samples_per_s']:,.1f}",
            f"{low:,.1f} to {high:,.1f}",
            f"{100 * row['idle_share']:.1f} %",
            f"{row['bytes_per_step'] / 1e6:,.2f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
            off or "-",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
