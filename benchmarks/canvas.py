"""How the figures look: colours, type, an empty figure, the file. The same lines give the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, QUIET, RULE, GRID = "#1f2328", "#57606a", "#d0d7de", "#e8eaed"
BLUE, GREEN, ORANGE, PURPLE, BROWN = "#2f6fb7", "#2b8a57", "#e8590c", "#8b1a6b", "#7a5230"
COLOURS = (BLUE, GREEN, ORANGE, PURPLE, QUIET)
METHOD_COLOURS = {"al": BLUE, "1f1b": GREEN, "penalty": ORANGE, "al+1f1b": PURPLE, "local": BROWN}
WIDTH_IN, PX_PER_IN = 9.375, 96
"""900 px; SVG counts 72 points to the inch, browsers 96 px."""
STYLE = {
    "svg.hashsalt": "dsaux",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Segoe UI", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": QUIET,
}


def new_figure(*, height_in: float, title: str) -> Figure:
    """An empty figure with rounded corners on white, as docs/figures/schedules.svg has it."""
    figure = Figure(figsize=(WIDTH_IN, height_in), facecolor="none")
    edge = 0.5 / PX_PER_IN
    card = FancyBboxPatch(
        (edge, edge),
        WIDTH_IN - 2 * edge,
        height_in - 2 * edge,
        boxstyle=f"round,pad=0,rounding_size={10 / PX_PER_IN}",
        facecolor="#ffffff",
        edgecolor=RULE,
        linewidth=0.75,
        transform=figure.dpi_scale_trans,
        zorder=-10,
    )
    figure.add_artist(card)
    figure.text(0.025, 1 - 0.3 / height_in, title, fontsize=13, fontweight="bold")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure; an SVG without date, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None, "Creator": "benchmarks/plot.py"})
        else:
            figure.savefig(path, dpi=PX_PER_IN)
