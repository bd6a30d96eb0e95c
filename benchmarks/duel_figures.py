"""Figures of docs/benchmarks.md, from the lines that `benchmarks/run.py` has written; `plot.py` draws them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import matplotlib as mpl
import matplotlib.ticker
from canvas import BLUE, BROWN, GREEN, INK, ORANGE, PURPLE, QUIET, STYLE, new_figure
from duel_tables import best_rows, idle_in_theory, newest_rows, rows_by_case, title_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from seeds import Row

COLOURS = {
    "dsaux-al": BLUE,
    "dsaux-penalty": ORANGE,
    "dsaux-local": BROWN,
    "deepspeed-1f1b": GREEN,
    "torch-1f1b": "#7fbf9b",
    "torch-interleaved": "#5a9e9e",
    "torch-zbv": PURPLE,
    "deepspeed-dualpipev": "#c77aa8",
    "ddp": INK,
    "one-process": QUIET,
}
"""One for each contestant, the same in all figures."""
FORWARD, BACKWARD = "#9ec5f0", BLUE


def throughput_figure() -> Figure:
    """Samples per second of everybody at the best number of micro-batches, a panel for each case of pipelines."""
    every = rows_by_case(newest_rows("compute"))
    cases = [(case, rows) for case, rows in every if any(row["stages"] > 1 for row in rows)]
    columns = min(3, len(cases))
    bands = -(-len(cases) // columns)
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = new_figure(
            height_in=0.8 + 3.1 * bands, title="Throughput, everybody at the best number of micro-batches"
        )
        panels = figure.subplots(bands, columns, squeeze=False).flatten()
        for axes, (case, rows) in zip(panels, cases, strict=False):
            _bars(axes, best_rows(rows), title=case + _oversubscribed(rows))
        for axes in panels[len(cases) :]:
            axes.set_visible(False)
        figure.tight_layout(rect=(0.01, 0.06 / bands, 0.99, 1 - 0.5 / figure.get_figheight()))
        _note(figure, "Samples per second, median and range of the blocks; in brackets M.")
    return figure


def idle_figure() -> Figure:
    """Idle share over the number of micro-batches, a panel for each number of ranks; dotted what theory says."""
    rows = newest_rows("sleep")
    ranks = sorted({row["ranks"] for row in rows})
    with mpl.rc_context(STYLE):
        figure = new_figure(height_in=4.2, title="Idle share of stages that sleep")
        panels = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(left=0.06, right=0.98, top=0.84, bottom=0.27, wspace=0.08)
        for axes, count in zip(panels, ranks, strict=True):
            for name, colour in COLOURS.items():
                own = sorted(
                    (_peers_count(row), row)
                    for row in rows
                    if row["ranks"] == count and row["contestant"] == name and _is_own_count(row)
                )
                if own:
                    at = [peers for peers, _ in own]
                    axes.plot(
                        at,
                        [100 * row["idle_share"] for _, row in own],
                        color=colour,
                        marker="o",
                        markersize=3,
                        label=name,
                    )
                    known = [(peers, idle_in_theory(row)) for peers, row in own]
                    known = [(peers, 100 * idle) for peers, idle in known if idle is not None]
                    axes.plot(*zip(*known, strict=True), color=colour, linestyle=":", linewidth=1) if known else None
            axes.set_xscale("log", base=2)
            counts = sorted({_peers_count(row) for row in rows if row["ranks"] == count})
            axes.set_xticks(counts, [str(number) for number in counts])
            axes.set_xticks([], minor=True)
            axes.set_title(f"{count} ranks", loc="left")
            axes.set_xlabel("micro-batches of the pipelines")
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("idle, %")
        handles = {line.get_label(): line for axes in panels for line in axes.lines if line.get_label()[0] != "_"}
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, bbox_to_anchor=(0.5, 0.045))
        _note(figure, "Dotted: in theory. dsaux has one micro-batch throughout: it needs no more.")
    return figure


def network_figure() -> Figure:
    """Step time over the rate of the link, and bytes on the wire."""
    rows = newest_rows("network")
    with mpl.rc_context(STYLE):
        figure = new_figure(height_in=4.0, title="Two hosts, one rank each, and a slow link")
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        figure.subplots_adjust(left=0.1, right=0.98, top=0.84, bottom=0.17, wspace=0.42)
        links = sorted({row["link_mbit"] or float("inf") for row in rows}, reverse=True)
        for name, colour in COLOURS.items():
            best = [
                best_rows(
                    [row for row in rows if (row["link_mbit"] or float("inf")) == link and row["contestant"] == name]
                )
                for link in links
            ]
            if all(best):
                left.plot(
                    range(len(links)),
                    [1000 * rows_of[0]["step_s"] for rows_of in best],
                    color=colour,
                    marker="o",
                    markersize=3,
                    label=name,
                )
        left.set_xticks(range(len(links)), ["unshaped" if link == float("inf") else f"{link:g}" for link in links])
        left.set_xlabel("link, Mbit/s")
        left.set_ylabel("step, ms")
        left.set_yscale("log")
        left.legend(loc="upper left")
        left.set_title("step time, each at its best M", loc="left")
        slowest = min(links)
        _bars(
            right,
            best_rows([row for row in rows if row["link_mbit"] == slowest]),
            title="MB on the wire in a step",
            value=lambda row: row["bytes_per_step"] / 1e6,
        )
    return figure


def race_figure() -> Figure:
    """Test accuracy over seconds of training: the mean of all seeds, and a faint line for each."""
    rows = newest_rows("accuracy")
    with mpl.rc_context(STYLE):
        figure = new_figure(height_in=4.2, title="Test accuracy over wall time")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.07, right=0.98, top=0.86, bottom=0.17)
        for row in rows:
            colour = COLOURS[row["contestant"]]
            for curve in row["curves"]:
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.8, alpha=0.25)
            means = [
                tuple(statistics.mean(values) for values in zip(*points, strict=True))
                for points in zip(*row["curves"], strict=True)
            ]
            axes.plot(
                *zip(*means, strict=True),
                color=colour,
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                label=row["contestant"],
            )
        axes.axhline(rows[0]["target"], color=QUIET, linestyle=":", linewidth=1)
        axes.set_xlabel("seconds of training, evaluations left out")
        axes.set_ylabel("test accuracy")
        axes.legend(loc="lower right", ncols=2)
        _note(figure, f"Mean over the seeds, faint the seeds; dotted: the target of {rows[0]['target']:g}.")
    return figure


def gantt_figure() -> Figure:
    """When each rank's stage worked, measured on the real engines: two steps of each contestant on one time axis."""
    rows = [row for row in newest_rows("sleep") if row.get("intervals") and _is_own_count(row)]
    if not rows:
        raise ValueError("no line of the suite sleep has intervals; measure the case p=4, M=8.")
    order = sorted(rows, key=lambda row: (list(COLOURS).index(row["contestant"]), row["micro_batches"]))
    end_s = max(end for row in order for rank in row["intervals"] for _, end, _ in rank)
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = new_figure(height_in=0.9 + 0.95 * len(order), title=f"Two steps as measured: {order[0]['case']}")
        panels = figure.subplots(len(order), 1, sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(
            left=0.24,
            right=0.98,
            top=1 - 0.55 / figure.get_figheight(),
            bottom=0.5 / figure.get_figheight(),
            hspace=0.25,
        )
        for axes, row in zip(panels, order, strict=True):
            for rank, intervals in enumerate(row["intervals"]):
                for kind, colour in (("forward", FORWARD), ("backward", BACKWARD)):
                    spans = [(start, end - start) for start, end, what in intervals if what == kind]
                    axes.broken_barh(spans, (rank - 0.42, 0.84), facecolors=colour, linewidth=0)
            axes.set_ylim(row["ranks"] - 0.4, -0.6)
            axes.set_yticks(range(row["ranks"]), [f"rank {rank}" for rank in range(row["ranks"])], fontsize=6.5)
            axes.set_xlim(0, 1.02 * end_s)
            axes.text(
                -0.115,
                0.5,
                f"{title_of(row)}\nM={row['micro_batches']}",
                transform=axes.transAxes,
                ha="right",
                va="center",
                fontsize=7.5,
            )
        panels[-1].set_xlabel("seconds; light: forward, dark: backward, white: idle")
    return figure


# ---- parts ----------------------------------------------------------------------------------------------------------


def _oversubscribed(rows: Sequence[Row]) -> str:
    """A second line for the name of a case whose ranks outnumber the cores."""
    cores = min(int(row["environment"]["cores"]) for row in rows)
    return f"\non {cores} cores" if max(int(row["ranks"]) for row in rows) > cores else ""


def _bars(axes: Axes, rows: Sequence[Row], *, title: str, value: Callable[[Row], float] | None = None) -> None:
    """Horizontal bars, one for each contestant."""
    rows = list(reversed(rows))
    at = range(len(rows))
    values = [row["samples_per_s"] if value is None else value(row) for row in rows]
    axes.barh(at, values, color=[COLOURS[row["contestant"]] for row in rows], height=0.7)
    if value is None:
        low = [row["samples_per_s"] - row["spread"][0] for row in rows]
        high = [row["spread"][1] - row["samples_per_s"] for row in rows]
        axes.errorbar(values, at, xerr=[low, high], fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    for position, number in zip(at, values, strict=True):
        is_short = number < 0.15 * max(values)  # no room within the bar
        axes.annotate(
            f" {number:,.3g}" if number < 100 else f" {number:,.0f}",
            (number if is_short else 0, position),
            va="center",
            fontsize=7,
            color=INK if is_short else "white",
        )
    axes.set_yticks(at, [f"{title_of(row)} ({row['micro_batches']})" for row in rows], fontsize=7.5)
    axes.set_title(title, loc="left", fontsize=8.5)


def _note(figure: Figure, text: str) -> None:
    figure.text(0.025, 0.16 / figure.get_figheight(), text, color=QUIET)


def _peers_count(row: Row) -> int:
    """Micro-batches of the pipelines in the row's case, named "p=4, M=8"."""
    return int(row["case"].rpartition("=")[2])


def _is_own_count(row: Row) -> bool:
    """Pipelines at the case's number of micro-batches, dsaux at one."""
    return bool(row["micro_batches"] == (1 if row["contestant"].startswith("dsaux") else _peers_count(row)))


FIGURES: dict[str, Callable[[], Figure]] = {
    "throughput": throughput_figure,
    "idle": idle_figure,
    "network": network_figure,
    "race": race_figure,
    "gantt": gantt_figure,
}
"""By the name of the figure and of its file in docs/figures/."""
