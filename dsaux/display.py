"""What a person sees of a run, on rank 0: a live panel on a terminal, plain lines anywhere else.

The trainer and `dsaux.report` call it. A file or a pipe gets lines without escape codes, as wide as
their content. The words and figures themselves are made in `dsaux.display_text`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsaux.display_text import (
    EXACT,
    Column,
    Pace,
    count,
    duration,
    evaluation_line,
    figure,
    layer_range,
    loss_figure,
    memory,
    mismatch_figure,
    plain_table,
    rich_table,
    share,
    stage_map,
    step_line,
    summary,
    throughput,
    time_left,
)
from dsaux.metrics import Clock, EvalStats, FinalStats, StageRow, StepStats

REDRAWS_PER_S = 1.0
"""The panel's thread shares the interpreter with the training: seldom is enough for a running clock."""


_T = TypeVar("_T")


class RunDisplay:
    """Shows one run; a context, so that an error leaves a clean terminal.

    Args:
        name: name of the run.
        model: name of the network.
        schedule: name of the schedule.
        stages: pipeline stages.
        replicas: copies of the pipeline.
        console: where to write; by default standard output.
        clock: seconds from any start; for tests.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        schedule: str,
        stages: int,
        replicas: int,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        # Said outright: rich would also take FORCE_COLOR in a batch job for a terminal.
        self.console = console or Console(force_terminal=sys.stdout.isatty(), highlight=False)
        self.name = name
        self.header = f"{model}, {schedule}, {count(stages, 'stage')} x {count(replicas, 'replica')}"
        self._clock = clock
        self._start = clock()
        self._pace = Pace()
        self._left_s: float | None = None
        self._step: StepStats | None = None
        self._evaluation: EvalStats | None = None
        self._layers: dict[int, str] = {}
        self._num_stages = stages
        self._live: Live | None = None
        self._is_entered = False
        self._is_live = self.console.is_terminal and not self.console.is_dumb_terminal

    def __enter__(self) -> RunDisplay:
        self._is_entered = True
        self.message(f"{self.name}: {self.header}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def stages(self, rows: Sequence[StageRow], *, unit: str = "s") -> None:
        """Show which rank holds what.

        Args:
            rows: one per rank.
            unit: what the shares are shares of: "s" (estimated time), "parameters" or "layers".
        """
        self._layers = {row.stage: layer_range(row) for row in rows}
        columns, cells = stage_map(rows, unit=unit)
        if not self._is_live:
            for line in plain_table(columns, cells):
                self._line(line)
            return
        if len({row.host for row in rows}) == 1:  # said once, the table then fits 80 columns
            self.console.print(Text(f"all ranks on {rows[0].host}"))
            columns, cells = _without(1, columns), [_without(1, row) for row in cells]
        self.console.print(rich_table(columns, cells))
        self.console.print()
        self._show_panel()

    def step(self, stats: StepStats) -> None:
        """Show the figures of one log line."""
        self._left_s = self._pace.left_s(stats, now=self._clock())
        self._step = stats
        if self._is_live:
            self._show_panel()
        else:
            self._line(step_line(stats, self._left_s))

    def _show_panel(self) -> None:
        # Not before: while the ranks start, libraries of all of them write to this terminal and would tear the panel.
        if self._live:
            self._live.refresh()
        elif self._is_entered:
            self._live = Live(get_renderable=self.frame, console=self.console, refresh_per_second=REDRAWS_PER_S)
            self._live.start(refresh=True)
            # A launcher that ends this process by a signal would leave the terminal without its cursor.
            self.console.show_cursor(True)

    def evaluation(self, stats: EvalStats) -> None:
        """Show the figures of one evaluation; they stay in view above the panel."""
        self._evaluation = stats
        self.message(evaluation_line(stats, epochs=self._step.epochs if self._step else None))

    def message(self, text: str) -> None:
        """Show a line, above the panel where there is one."""
        if self._is_live:
            self.console.print(Text(text))
        else:
            self._line(text)

    def warning(self, text: str) -> None:
        """Show a warning, above the panel where there is one."""
        if self._is_live:
            self.console.print(Text.assemble(("warning: ", "bold yellow"), text))
        else:
            self._line(f"warning: {text}")

    def final(self, stats: FinalStats, path: str) -> None:
        """Close the panel and show the result.

        Args:
            stats: the result.
            path: the run folder.
        """
        self._stop()
        rows = summary(stats, path)
        if self._is_live:
            grid = Table.grid(padding=(0, 3))
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column(overflow="fold")
            for name, value in rows:
                grid.add_row(name, Text(value))
            self.console.print(Panel(grid, title=Text(f"{self.name}: result"), title_align="left", expand=False))
        else:
            self._line(f"{self.name}: result")
            width = max(len(name) for name, _ in rows)
            for name, value in rows:
                self._line(f"  {name:<{width}}  {value}")

    def frame(self) -> RenderableType:
        """The live panel as it is now."""
        parts: list[RenderableType] = [Text(self.header), self._progress()]
        if self._step or self._evaluation:
            parts += [Text(), self._values()]
        if self._step:
            parts += [Text(), self._stage_table(self._step)]
        return Panel(Group(*parts), title=Text(self.name, "bold"), title_align="left")

    # ---- parts ----

    def _stop(self) -> None:
        self._is_entered = False
        if self._live:
            self._live.stop()
            self._live = None

    def _line(self, text: str) -> None:
        self.console.out(text, highlight=False)
        self.console.file.flush()

    def _progress(self) -> RenderableType:
        elapsed = f"{duration(self._clock() - self._start)} since start"
        stats = self._step
        if stats is None:
            return Text(elapsed)
        epoch = f"epoch {stats.epoch}/{stats.epochs}" + (f", exact ({EXACT})" if stats.phase == EXACT else "")
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(f"step {stats.step}/{stats.total_steps}", ProgressBar(stats.total_steps, stats.step), epoch)
        return Group(grid, Text(f"{elapsed}, {time_left(self._left_s)}"))

    def _values(self) -> Table:
        step, evaluation = self._step, self._evaluation
        values = {
            "loss": loss_figure(step.loss) if step else "-",
            "train accuracy": share(step.train_accuracy) if step else "-",
            "test accuracy": f"{evaluation.top1:.3f} (epoch {evaluation.epoch})" if evaluation else "-",
            "samples/s": throughput(step.samples_per_s) if step else "-",
            "learning rate": f"{step.learning_rate:.4g}" if step else "-",
        }
        grid = Table.grid(padding=(0, 3))
        for _ in values:
            grid.add_column(no_wrap=True)
        grid.add_row(*(Text(name, "dim") for name in values))
        grid.add_row(*(Text(value, "bold") for value in values.values()))
        return grid

    def _stage_table(self, stats: StepStats) -> Table:
        cells = []
        for stage in range(self._num_stages):
            loss = stats.stage_loss[stage] if stage < len(stats.stage_loss) else None
            cells.append(
                [
                    str(stage),
                    self._layers.get(stage, "-"),
                    "-" if loss is None else f"{loss:.3g}",
                    mismatch_figure(stats.boundary_mismatch[stage]) if stage < len(stats.boundary_mismatch) else "-",
                    figure(stats.boundary_adjoint[stage]) if stage < len(stats.boundary_adjoint) else "-",
                    figure(stats.waited_ticks[stage]) if stage < len(stats.waited_ticks) else "-",
                    memory(stats.peak_memory_bytes[stage]) if stage < len(stats.peak_memory_bytes) else "-",
                ]
            )
        columns = [
            Column("stage"),
            Column("layers", is_text=True),
            Column("local loss"),
            Column("mismatch\nto next"),
            Column("adjoint/\ncoupling"),
            Column("ticks\nwaited"),
            Column("peak memory"),
        ]
        return rich_table(columns, cells)


def _without(place: int, entries: list[_T]) -> list[_T]:
    return entries[:place] + entries[place + 1 :]
