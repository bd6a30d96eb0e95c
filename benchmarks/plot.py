"""Draw the figures of the documents from what was measured; needs matplotlib (pip install -e '.[bench]').

    python benchmarks/plot.py choices                                        docs/figures/choices.svg
    python benchmarks/plot.py accuracy --suite "resnet20, 3 stages"          docs/figures/accuracy.svg
    python benchmarks/plot.py throughput (idle, network, race, gantt)        of the suites of benchmarks/run.py

The same lines give the same bytes: no date, no random names, text as text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import choices
import duel_figures
import matplotlib as mpl
import matplotlib.ticker
from canvas import BLUE, COLOURS, INK, METHOD_COLOURS, ORANGE, QUIET, STYLE, new_figure, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import CHOICES, SEEDS, data_of, value_text
from seeds import Row, changes_of

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs/figures"
CurveKey = tuple[str, str, tuple[str, ...]]


def main() -> int:
    """Draw one figure; 1 if there is nothing to draw, 2 for wrong input."""
    arguments = parse_arguments()
    if (wrong := what_is_wrong(arguments)) is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    try:
        if arguments.figure == "choices":
            rows = data_of(arguments.data or CHOICES, command="benchmarks/choices.py")
            figure = choices_figure(rows, case=arguments.case)
        elif arguments.figure in duel_figures.FIGURES:
            figure = duel_figures.FIGURES[arguments.figure]()
        else:
            rows = data_of(arguments.data or SEEDS, command="benchmarks/seeds.py")
            figure = accuracy_figure(rows, suites=arguments.suite)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    save(figure, arguments.out or FIGURES / f"{arguments.figure}.svg")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("choices", "accuracy", *duel_figures.FIGURES), help="what to draw")
    parser.add_argument("--case", default="choices", help="choices: name of the configuration (choices)")
    parser.add_argument("--suite", action="append", default=[], help="accuracy: a suite of seeds.jsonl, a panel each")
    parser.add_argument("--data", type=Path, help="file of results, if not the usual one")
    parser.add_argument("--out", type=Path, help="file to write, if not the usual one; .png works as well")
    arguments = parser.parse_args()
    if arguments.figure == "accuracy" and not arguments.suite:
        parser.error("accuracy needs --suite NAME, once or more.")
    return arguments


def what_is_wrong(arguments: argparse.Namespace) -> str | None:
    """What the command line asks for that is not there or would have no effect; None if nothing is."""
    endings = (".pdf", ".png", ".svg")
    if arguments.out is not None and arguments.out.suffix not in endings:
        return f"--out is {arguments.out}; a figure is written as one of {', '.join(endings)}. Change its ending."
    for option, value in (("--data", arguments.data), ("--suite", arguments.suite)):
        if value and arguments.figure in duel_figures.FIGURES:
            return f"{option} has no effect on {arguments.figure}, which has its own files. Leave it out."
    if arguments.data is not None and not arguments.data.is_file():
        return f"--data {arguments.data} is missing or no file. Give one that the benchmarks have written."
    return None


# ---- choices --------------------------------------------------------------------------------------------------------


def choices_figure(rows: Sequence[Row], *, case: str) -> Figure:
    """Two panels a group: test accuracy with its range over the seeds, below it the mismatch of each boundary.

    Args:
        rows: lines of choices.jsonl.
        case: name of the configuration to draw.

    Raises:
        ValueError: if it has no group with lines.
    """
    own = [row for row in rows if row["case"] == case]
    groups = [group for group in choices.GROUPS if choices.points(own, group)]
    if not groups:
        raise ValueError(f"there is no group of {case!r} to draw; measure with benchmarks/choices.py, or give --case.")
    columns = min(4, len(groups))
    bands = -(-len(groups) // columns)
    with mpl.rc_context(STYLE):
        figure = new_figure(height_in=0.9 + 3.3 * bands, title="One choice changed at a time: test accuracy, mismatch")
        margin = 0.62 / figure.get_figheight()
        grid = figure.add_gridspec(
            2 * bands,
            columns,
            height_ratios=(1.5, 1) * bands,
            left=0.07,
            right=0.975,
            top=1 - margin,
            bottom=margin * 1.25,
            wspace=0.28,
            hspace=0.5,
        )
        shared: dict[int, Axes] = {}
        for place, group in enumerate(groups):
            band, column = divmod(place, columns)
            above, below = (
                figure.add_subplot(grid[2 * band + part, column], sharey=shared.get(part)) for part in (0, 1)
            )
            shared.setdefault(0, above)
            shared.setdefault(1, below)
            draw_group(above, below, group=group, points=choices.points(own, group))
            if column == 0:
                above.set_ylabel("test accuracy")
                below.set_ylabel("mismatch")
        note = (
            "Mean and range over the seeds (the table has n). Dashed line and ring: the base. "
            "Cross: a run that failed. Mismatch: a line for each boundary."
        )
        figure.text(0.025, 0.16 / figure.get_figheight(), note, color=QUIET)
    return figure


def draw_group(above: Axes, below: Axes, *, group: str, points: Sequence[tuple[Any, list[Row]]]) -> None:
    """The two panels of one group."""
    base = points[0][1][0]["base"][group]
    boundaries: dict[int, list[tuple[int, float]]] = {}
    means = []
    for x, (value, rows) in enumerate(points):
        finals = [row["final"] for row in rows if not row["failed"]]
        accuracy = [final["test_accuracy"] for final in finals]
        failed = len(rows) - len(finals)
        if accuracy:
            means.append((x, statistics.mean(accuracy)))
            above.plot([x, x], [min(accuracy), max(accuracy)], color=BLUE, linewidth=4, alpha=0.35)
            if value == base:
                above.axhline(means[-1][1], color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
                above.plot(*means[-1], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=INK)
        if failed:
            label = f"{failed} of {len(rows)} failed" if len(points) < 4 else f"{failed}/{len(rows)}"
            floor = above.get_xaxis_transform()
            above.plot(
                x, 0.06, marker="x", color=ORANGE, markersize=7, markeredgewidth=2, transform=floor, clip_on=False
            )
            above.text(x, 0.13, label, color=ORANGE, transform=floor, ha="center", fontsize=8)
        for boundary, mismatches in enumerate(zip(*(final["boundary_mismatch"] for final in finals), strict=True)):
            known = [mismatch for mismatch in mismatches if mismatch is not None]
            if known:
                boundaries.setdefault(boundary, []).append((x, statistics.mean(known)))
    above.plot(*zip(*means, strict=True), color=BLUE, linewidth=1.2, marker="o", markersize=4.5) if means else None
    # The higher of two labels stands above its line, the lower one below: lines often end close to each other.
    ends = sorted(boundaries, key=lambda boundary: boundaries[boundary][-1][1])
    for boundary, line in boundaries.items():
        lift = 3.5 * (2 * ends.index(boundary) - len(ends) + 1)
        colour = COLOURS[(boundary + 1) % len(COLOURS)]
        below.plot(*zip(*line, strict=True), color=colour, linewidth=1, marker=".", markersize=5)
        below.annotate(
            f"{boundary}-{boundary + 1}",
            line[-1],
            xytext=(5, lift),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="center",
        )
    above.set_title(f"aux.{group}", loc="left")
    for axes in (above, below):
        axes.set_xlim(-0.45, len(points) - 0.55 + 0.2)
        axes.set_xticks(range(len(points)), [value_text(value) for value, _ in points])
    below.set_yscale("log")
    below.yaxis.set_major_locator(mpl.ticker.LogLocator())
    below.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    below.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


# ---- accuracy -------------------------------------------------------------------------------------------------------


def accuracy_figure(rows: Sequence[Row], *, suites: Sequence[str]) -> Figure:
    """A panel for each suite: test accuracy by epoch, mean and range over the seeds of each configuration.

    Args:
        rows: lines of seeds.jsonl.
        suites: names of suites.

    Raises:
        ValueError: if a suite has no line with evaluations.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(height_in=4.3, title="Test accuracy by epoch")
        panels = figure.subplots(1, len(suites), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(left=0.07, right=0.975, top=0.84, bottom=0.19, wspace=0.1)
        for axes, suite in zip(panels, suites, strict=True):
            curves = accuracy_curves(rows, suite=suite)
            for (case, method, changes), curve in curves.items():
                colour, epochs = METHOD_COLOURS.get(method, QUIET), sorted(curve)
                axes.fill_between(
                    epochs,
                    [min(curve[epoch]) for epoch in epochs],
                    [max(curve[epoch]) for epoch in epochs],
                    color=colour,
                    alpha=0.18,
                    linewidth=0,
                )
                means = [statistics.mean(curve[epoch]) for epoch in epochs]
                label = f"{method} ({', '.join([case, *changes])})"
                line = {"linewidth": 1.6, "linestyle": "--" if changes else "-", "marker": "o", "markersize": 3}
                axes.plot(epochs, means, color=colour, label=label, **line)
            axes.set_title(suite, loc="left")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            axes.legend(loc="lower right")
        panels[0].set_ylabel("test accuracy")
        note = "Mean and range over the seeds, BatchNorm re-estimated; the AuxNet takes no part in an evaluation."
        figure.text(0.025, 0.16 / figure.get_figheight(), note, color=QUIET)
    return figure


def accuracy_curves(rows: Sequence[Row], *, suite: str) -> dict[CurveKey, dict[int, list[float]]]:
    """Accuracies of all seeds by (configuration, method, changes in the configuration) and epoch.

    Raises:
        ValueError: if the suite has no line with evaluations.
    """
    curves: dict[CurveKey, dict[int, list[float]]] = {}
    for row in rows:
        if row["suite"] == suite and row.get("evals"):
            curve = curves.setdefault((row["case"], row["final"]["method"], tuple(changes_of(row))), {})
            for epoch, accuracy in row["evals"]:
                curve.setdefault(epoch, []).append(accuracy)
    if not curves:
        raise ValueError(f"suite {suite!r} has no line with evaluations; measure it with benchmarks/seeds.py.")
    return curves


if __name__ == "__main__":
    sys.exit(main())
