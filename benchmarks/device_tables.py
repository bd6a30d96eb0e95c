"""The table of one GPU in docs/benchmarks.md, from the lines that `benchmarks/device.py` has written."""

from __future__ import annotations

import statistics
from pathlib import Path

from markdown import environment_line, table_line
from seeds import Row, read_lines

RESULTS = Path(__file__).resolve().parent / "results/device.jsonl"
MODES = ("eager", "compiled", "graphed", "compiled graphed", "graphed aside")
_HEADS = (
    "network, batch",
    "stage",
    "precision",
    "eager, ms",
    "compiled, ms",
    "graphed, ms",
    "compiled and graphed, ms",
    "graphed, segment aside, ms",
    "eager / graphed",
    "plain loop compiled, ms",
    "AuxNet's share, graphed",
    "TFLOP/s, fastest (of a matrix product)",
    "peak memory, eager / graphed",
)


def device_table(path: Path = RESULTS) -> str:
    """A line for each stage and precision; what was not measured is "-"."""
    rows = [row for row in read_lines(path) if row["failed"] is None and row["skipped"] is None]
    if not rows:
        return "Not measured yet: `python benchmarks/device.py` on a GPU."
    steps: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "step":  # of the lines of one kind the newest
            key = (row["model"], row["stages"], row["batch"], row["stage"], row["precision"], row["channels_last"])
            steps.setdefault(key, {})[row["mode"]] = row
    lines = [table_line(_HEADS), "|" + "---|" * len(_HEADS)]
    lines += [table_line(_cells(modes)) for modes in steps.values()]
    notes = [_equality(row) for row in {row["case"]: row for row in rows if row["kind"] == "equality"}.values()]
    notes += [_engine(row) for row in {row["case"]: row for row in rows if row["kind"] == "engine"}.values()]
    busy = " Other work ran beside some of them." if any(row["machine_was_busy"] for row in rows) else ""
    measured = "Medians; " + environment_line([row["environment"] for row in rows]) + busy
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes), measured])


def _cells(modes: dict[str, Row]) -> list[str]:
    first = next(iter(modes.values()))
    fastest = min(modes.values(), key=lambda row: float(row["step_s"][0]))
    eager, graphed = modes.get("eager"), modes.get("graphed")
    layout = "" if first["channels_last"] else ", NCHW"
    ratio = "-" if eager is None or graphed is None else f"{eager['step_s'][0] / graphed['step_s'][0]:.2f}"
    memory = (f"{row['peak_memory_bytes'] / 2**30:.2f} GiB" if row else "-" for row in (eager, graphed))
    return [
        f"{first['model']}, {first['batch']}",
        f"{first['stage']} of {first['stages']}",
        first["precision"] + layout,
        *(_milliseconds(modes.get(mode)) for mode in MODES),
        ratio,
        _milliseconds(modes.get("bare")),
        "-" if graphed is None else f"{100 * graphed['aux_share']:.0f} %",
        f"{fastest['flops_per_s'] / 1e12:.1f} ({100 * fastest['share_of_peak']:.0f} %)",
        " / ".join(memory),
    ]


def _milliseconds(row: Row | None) -> str:
    return "-" if row is None else f"{1e3 * row['step_s'][0]:.2f}"


def _equality(row: Row) -> str:
    case = row["case"].removesuffix(", equality")
    return (
        f"{case}: {row['steps']} losses of a graphed run differ from an eager one's by "
        f"{row['graphed_largest_difference']:.2g} at most, two eager runs' by {row['eager_largest_difference']:.2g} "
        f"(kernels that repeat their bits; {row['first_loss']:.3f} at first, {row['last_loss']:.3f} at last)."
    )


def _engine(row: Row) -> str:
    eager, graphed = (1e3 * statistics.median(row[key]) for key in ("eager_s", "graphed_s"))
    return (
        f"The engine, {row['case']}: {eager:.2f} ms a step, {graphed:.2f} ms with `cuda_graphs`; {row['steps']} losses "
        f"differ by {row['graphed_largest_difference']:.2g} at most."
    )
