"""Draws schedules as text, picture and trace file; used by `python -m dsaux.schedules`, which says how."""

from __future__ import annotations

import json

from dsaux.schedules.picture import comparison_svg, svg
from dsaux.schedules.timeline import AUX, BACKWARD, FORWARD, STEP, Piece, Timeline, rhythm, title

__all__ = ["chrome_trace", "comparison_svg", "comparison_text", "svg", "text_grid"]

_COLUMNS_PER_UNIT = 8
"""Characters for a stage's forward pass over a batch in :func:`comparison_text`."""


def text_grid(timeline: Timeline) -> str:
    """Draw a schedule by its own steps: a row per stage, a column per step, ``|`` where the optimizer steps.

    F is a stage's forward and B its backward pass, the number counts micro-batches from the start::

        step      0     1     2     3     4     5
        stage 0   F0    .     F1    B0    .     B1  |
        stage 1   .     F0    B0    F1    B1    .   |

    Where each step ends with an optimizer step, a step is a tick and the bars are left out.
    """
    cells = [["."] * timeline.num_steps for _ in range(timeline.num_stages)]
    for piece in timeline.pieces:
        if piece.kind not in (FORWARD, BACKWARD):
            continue
        letter = "F" if piece.kind == FORWARD else "B"
        number = str(piece.batch * timeline.micro_batches + piece.micro_batch)
        cell = cells[piece.stage][piece.step].removesuffix(number).removesuffix(".")
        cells[piece.stage][piece.step] = f"{cell}{letter}{number}"
    steps = {(piece.stage, piece.step) for piece in timeline.pieces if piece.kind == STEP}
    last_steps = {step for _, step in steps}
    every_step = len(last_steps) == timeline.num_steps
    width = max(len(cell) for row in cells for cell in row) + (3 if every_step else 2)
    rows = [[str(step) for step in range(timeline.num_steps)], *cells]
    lines = []
    for stage, row in enumerate(rows, start=-1):
        head = f"stage {stage}" if stage >= 0 else "tick" if every_step else "step"
        bars = ["| " if (stage, step) in steps else "  " for step in range(len(row))]
        ends = ["" if every_step or step not in last_steps else bars[step] for step in range(len(row))]
        body = "".join(f"{cell:<{width}}{end}" for cell, end in zip(row, ends, strict=True))
        lines.append(f"{head:<10}{body}".rstrip())
    return "\n".join(lines)


def comparison_text(above: Timeline, below: Timeline) -> str:
    """Draw two timelines on one time axis; `below` is cut where `above` ends.

    Args:
        above: the timeline that sets the length of the axis.
        below: a timeline that lasts at least as long.
    """
    end = above.end
    parts = [f"{title(its, end)}, {rhythm(its)}\n{_bars(its, end)}" for its in (above, below)]
    legend = (
        f"F forward, B backward, a AuxNet ({100 * below.aux_share:.0f} % of a stage), . idle, | step\n"
        "The number is the micro-batch (1F1B) or the batch (dsaux).\n"
        f"Unit of time: a stage's forward pass over a batch, {_COLUMNS_PER_UNIT} columns."
    )
    return "\n\n".join([*parts, legend])


def chrome_trace(timeline: Timeline) -> str:
    """JSON that chrome://tracing and Perfetto open: a process per stage, a unit of time is 1 ms, messages as arrows."""
    events: list[dict[str, object]] = []
    for stage in range(timeline.num_stages):
        events.append({"name": "process_name", "ph": "M", "pid": stage, "tid": 0, "args": {"name": f"stage {stage}"}})
    for piece in timeline.pieces:
        length = {"ph": "i", "s": "p"} if piece.kind == STEP else {"ph": "X", "dur": _us(piece.end - piece.start)}
        events.append(
            {
                "name": f"{piece.name} {piece.batch}.{piece.micro_batch}",
                "cat": piece.kind,
                "pid": piece.stage,
                "tid": 0,
                "ts": _us(piece.start),
                "args": {"batch": piece.batch, "micro_batch": piece.micro_batch, "step": piece.step},
                **length,
            }
        )
    for number, flight in enumerate(timeline.flights):
        ends = [("s", flight.sender, flight.start), ("f", flight.receiver, flight.end)]
        for phase, stage, time in ends:
            name = f"message {flight.batch}"
            arrow = {"ph": phase, "name": name, "cat": "message", "id": number, "pid": stage, "tid": 0, "ts": _us(time)}
            events.append(arrow)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=1)


def _us(units: float) -> float:
    return round(1000.0 * units, 3)


def _bars(timeline: Timeline, end: float) -> str:
    width = _column(end)
    rows = [["."] * width for _ in range(timeline.num_stages)]
    for piece in timeline.pieces:
        first, last = _column(piece.start), min(_column(piece.end), width)
        if piece.kind == STEP and last > 0 and piece.end <= end:
            row = rows[piece.stage]
            if row[last - 1] == "a":
                row[last - 2] = "a"  # the bar may not hide a short AuxNet pass
            row[last - 1] = "|"
        for column, character in zip(range(first, last), _characters(piece, timeline, last - first), strict=False):
            rows[piece.stage][column] = character
    return "\n".join(f"stage {stage}  {''.join(row)}".rstrip() for stage, row in enumerate(rows))


def _characters(piece: Piece, timeline: Timeline, length: int) -> str:
    if piece.kind == AUX:
        return "a" * length
    number = piece.batch if timeline.micro_batches == 1 else piece.micro_batch
    letter = "F" if piece.kind == FORWARD else "B"
    return f"{letter}{number}".ljust(length, "-" if piece.kind == FORWARD else "=")[: max(length, 0)]


def _column(time: float) -> int:
    return round(_COLUMNS_PER_UNIT * time + 1e-9)
