"""The words, figures and tables of the display: pure functions of what a run reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from dsaux.metrics import MISMATCH_LIMIT, EvalStats, FinalStats, StageRow, StepStats

EXACT, GREEDY = "1f1b", "local"


@dataclass(frozen=True)
class Column:
    """A column of a table: text to the left, numbers to the right; only the panel breaks its name."""

    name: str
    is_text: bool = False


class Pace:
    """Estimates the time left from all log lines of the present phase, evaluations included."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._first = (0, 0.0)

    def left_s(self, stats: StepStats, *, now: float) -> float | None:
        """Estimated time to the end of the training; None at the first line of a phase."""
        if stats.step >= stats.total_steps:
            return 0.0
        if stats.phase != self._phase:
            self._phase, self._first = stats.phase, (stats.step, now)
        steps = stats.step - self._first[0]
        return (now - self._first[1]) / steps * (stats.total_steps - stats.step) if steps > 0 else None


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:23."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def memory(size_bytes: int) -> str:
    """A size in MiB or GiB."""
    mebibytes = size_bytes / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.2f} GiB"


def step_line(stats: StepStats, left_s: float | None) -> str:
    """One log line, with the largest mismatch of all boundaries; the columns keep their places over a run."""
    worst = max(stats.boundary_mismatch, key=_nan_last, default=None)
    phases = {EXACT: f"exact ({EXACT})", GREEDY: "local losses"}
    match = phases.get(stats.phase, f"mismatch {share(worst):>5}")
    epochs, steps = len(str(stats.epochs)), len(str(stats.total_steps))
    return (
        f"epoch {stats.epoch:>{epochs}}/{stats.epochs}  step {stats.step:>{steps}}/{stats.total_steps}"
        f"  loss {loss_figure(stats.loss):>5}  train {share(stats.train_accuracy):>5}  {match:<14}"
        f"  {throughput(stats.samples_per_s):>5} samples/s  {time_left(left_s)}"
    )


def evaluation_line(stats: EvalStats, *, epochs: int | None) -> str:
    """One line for an evaluation; `epochs` is the length of the run, where it is known."""
    length = "" if epochs is None else f"/{epochs}"
    epoch = f"epoch {stats.epoch:>{max(1, len(length) - 1)}}{length}  " if stats.step else ""
    return (
        f"{epoch}test  top-1 {stats.top1:.3f}  top-5 {stats.top5:.3f}  loss {figure(stats.loss)}"
        f"  {stats.samples:,} {stats.unit} in {stats.seconds:.1f} s  ({stats.method})"
    )


def stage_map(rows: Sequence[StageRow], *, unit: str) -> tuple[list[Column], list[list[str]]]:
    """Columns and cells of the map of ranks; `unit` is that of the partition's costs."""
    columns = [
        Column("rank"),
        Column("host", is_text=True),
        Column("device", is_text=True),
        Column("replica"),
        Column("stage"),
        Column("layers", is_text=True),
        Column("parameters"),
        Column("% of\ntime" if unit == "s" else f"% of\n{unit}"),
    ]
    cells = [
        [
            str(row.rank),
            row.host,
            row.device,
            str(row.replica),
            str(row.stage),
            layer_range(row),
            f"{row.parameters:,}",
            "-" if row.share is None else f"{100 * row.share:.1f}",
        ]
        for row in rows
    ]
    return columns, cells


def summary(stats: FinalStats, path: str) -> list[tuple[str, str]]:
    """The result of a run as names and values; without speed and memory where no step was measured."""
    exact = f" ({stats.exact_epochs} of them exact)" if stats.exact_epochs else ""
    mismatches = ", ".join(
        f"{mismatch_figure(value)} (stages {boundary}-{boundary + 1})"
        for boundary, value in enumerate(stats.boundary_mismatch)
    )
    waits = ", ".join(f"{100 * share:.1f} % (stage {stage})" for stage, share in enumerate(stats.wait_share))
    peaks = ", ".join(f"{memory(size)} (stage {stage})" for stage, size in enumerate(stats.peak_memory_bytes))
    speed = f"{throughput(stats.train_samples_per_s)} samples/s while training"
    return [
        ("network", f"{stats.model} on {stats.data}, seed {stats.seed}"),
        ("method", f"{stats.method}, {count(stats.stages, 'stage')} x {count(stats.replicas, 'replica')}"),
        ("trained", f"{count(stats.epochs, 'epoch')}{exact}, {count(stats.steps, 'step')}"),
        (
            "test accuracy",
            f"{stats.test_accuracy:.3f} top-1, {stats.test_top5:.3f} top-5 ({stats.test_samples:,} {stats.unit})",
        ),
        ("test loss", figure(stats.test_loss)),
        *([("throughput", speed)] if stats.train_samples_per_s > 0 else []),
        ("wall time", duration(stats.wall_s)),
        ("waits", waits or "-"),
        ("mismatch", mismatches or "-"),
        *([("peak memory", peaks)] if peaks else []),
        ("run folder", path),
    ]


def layer_range(row: StageRow) -> str:
    """First and last layer of a stage."""
    return row.first_layer if row.first_layer == row.last_layer else f"{row.first_layer} .. {row.last_layer}"


def rich_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Table:
    """A table for the panel: text folds where the terminal is narrow, figures never do."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        side: Literal["left", "right"] = "left" if column.is_text else "right"
        table.add_column(column.name, justify=side, no_wrap=not column.is_text, overflow="fold", vertical="top")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def plain_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, as wide as its content."""
    lines = [[column.name.replace("\n", " ") for column in columns], *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if column.is_text else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


def count(number: int, noun: str) -> str:
    """1 stage, 2 stages."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def figure(value: float) -> str:
    """About four digits, in five characters where they suffice."""
    size = abs(value)
    return f"{value:.3f}" if size < 9.9995 else f"{value:.2f}" if size < 99.995 else f"{value:.4g}"


def share(value: float | None) -> str:
    """A figure that may be missing."""
    return "-" if value is None else figure(value)


def loss_figure(value: float) -> str:
    """A loss; a dash where none is known yet, as before the first batch of a wavefront has come to the last stage."""
    return share(None if math.isnan(value) else value)


def mismatch_figure(value: float) -> str:
    """A relative mismatch, marked where it is too much."""
    return figure(value) if value <= MISMATCH_LIMIT else f"high {figure(value)}"


def throughput(value: float) -> str:
    """Samples per second, without the unit."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def time_left(seconds: float | None) -> str:
    """Time to the end of the training; None where it cannot be told yet."""
    return "-:--:-- left" if seconds is None else f"{duration(seconds)} left"


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
