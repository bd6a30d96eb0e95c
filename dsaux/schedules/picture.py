"""Timelines as SVG, on a white ground of their own so that they read on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from dsaux.schedules.timeline import AUX, BACKWARD, FORWARD, STEP, Flight, Piece, Timeline, rhythm, title

_WIDTH = 900
_LEFT, _RIGHT = 84, 28
_ROW, _GAP = 30, 4
_IDLE, _INK, _QUIET, _STEP, _MESSAGE = "#e8eaed", "#1f2328", "#57606a", "#1f2328", "#8b1a6b"
_FILL = {FORWARD: ("#2f6fb7", "#4a84c8"), BACKWARD: ("#2b8a57", "#419a6b"), AUX: ("#e8590c", "#e8590c")}
"""Colours of even and odd batches."""
_FONT = "-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif"
_MIN_LABEL_PX = 9.0


def svg(timeline: Timeline) -> str:
    """One timeline as an SVG picture, 900 px wide."""
    heading = f"{timeline.num_stages} stages, {timeline.num_batches} batches"
    return _page(heading, [timeline], end=timeline.end, notes=[])


def comparison_svg(above: Timeline, below: Timeline) -> str:
    """Two timelines on one time axis as an SVG picture, 900 px wide; `below` is cut where `above` ends.

    Args:
        above: the timeline that sets the length of the axis.
        below: a timeline that lasts at least as long.
    """
    heading = f"The same batches through one network on {above.num_stages} devices, on one time axis"
    share = 100 * below.aux_share
    has_aux = any(piece.kind == AUX for piece in below.pieces)
    notes = [
        "Simulated: equal stages, a backward pass twice as long as a forward pass, transfers free.",
        f"1F1B idles less with more micro-batches; dsaux pays with the AuxNet ({share:.0f} % of a stage)"
        if has_aux
        else "1F1B idles less with more micro-batches; dsaux pays with small heads, which are not drawn,",
        "and trains each stage on a local loss, where 1F1B has the exact gradient.",
    ]
    if below.has_fill:
        notes.append("A wavefront fills once an epoch, as drawn, and takes as long to drain; idle is counted as drawn.")
    return _page(heading, [above, below], end=above.end, notes=notes)


def _page(heading: str, timelines: Sequence[Timeline], *, end: float, notes: Sequence[str]) -> str:
    scale = (_WIDTH - _LEFT - _RIGHT) / end
    body = [_text(24, 36, heading, size=18, weight=600)]
    y = 62.0
    for timeline in timelines:
        body.append(_text(24, y + 14, title(timeline, end), size=15, weight=600))
        body.append(_text(_WIDTH - _RIGHT, y + 14, rhythm(timeline), size=14, fill=_QUIET, anchor="end"))
        body += _panel(timeline, y + 26, scale=scale, end=end)
        y += 26 + timeline.num_stages * (_ROW + _GAP) + 22
    body += _axis(y - 14, scale=scale, end=end)
    has_aux = any(piece.kind == AUX for its in timelines for piece in its.pieces)
    flights = [flight for its in timelines for flight in its.flights]
    body += _legend(y + 52, has_aux=has_aux, sent=_what_is_sent(flights))
    for line, note in enumerate(notes):
        body.append(_text(24, y + 80 + 19 * line, note, size=13, fill=_QUIET))
    height = round(y + 66 + 19 * len(notes) + (8 if notes else 4))
    label = escape(f"{heading}. " + "; ".join(title(timeline, end) for timeline in timelines))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" font-family="{_FONT}" role="img">',
            f"<title>{label}</title>",
            f'<rect x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="10" fill="#ffffff" '
            'stroke="#d0d7de"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _panel(timeline: Timeline, top: float, *, scale: float, end: float) -> list[str]:
    parts = []
    for stage in range(timeline.num_stages):
        y = top + stage * (_ROW + _GAP)
        parts.append(_text(24, y + 20, f"stage {stage}", size=13, fill=_QUIET))
        parts.append(_rect(_LEFT, y, end * scale, _ROW, fill=_IDLE))
    for piece in timeline.pieces:
        y = top + piece.stage * (_ROW + _GAP)
        x, right = _LEFT + piece.start * scale, _LEFT + min(piece.end, end) * scale
        if piece.kind == STEP and piece.end <= end:
            parts += _step_mark(right, y)
        elif piece.kind != STEP and right - x > 0.05:
            parts.append(_rect(x, y, right - x, _ROW, fill=_FILL[piece.kind][piece.batch % 2], edge=True))
            if piece.kind != AUX and right - x >= _MIN_LABEL_PX:
                parts.append(_label(piece, timeline, (x + right) / 2, y + 20, width=right - x))
    marks = [part for part in parts if 'class="step"' in part]
    arrows = [_arrow(flight, top, scale=scale) for flight in timeline.flights if flight.end <= end]
    return [part for part in parts if 'class="step"' not in part] + marks + arrows


def _label(piece: Piece, timeline: Timeline, x: float, y: float, *, width: float) -> str:
    number = piece.batch if timeline.micro_batches == 1 else piece.micro_batch
    words = {FORWARD: "forward", BACKWARD: "backward"}[piece.kind]
    wide = f"{words} {number}"
    text = wide if width >= 8.0 * len(wide) else f"{words[0].upper()}{number}" if width >= 20 else f"{number}"
    return _text(x, y, text, size=13 if width >= 16 else 11, fill="#ffffff", anchor="middle")


def _step_mark(x: float, y: float) -> list[str]:
    top, bottom = y - 2, y + _ROW + 2
    return [f'<path class="step" d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{_STEP}" stroke-width="3"/>']


def _arrow(flight: Flight, top: float, *, scale: float) -> str:
    """From where the sender starts to send to where the receiver uses the message, in the row above or below."""
    leave, reach = (3, _ROW - 3) if flight.receiver < flight.sender else (_ROW - 3, 3)
    x, y = _LEFT + flight.start * scale, top + flight.sender * (_ROW + _GAP) + leave
    to_x, to_y = _LEFT + flight.end * scale, top + flight.receiver * (_ROW + _GAP) + reach
    length = math.hypot(to_x - x, to_y - y)
    along_x, along_y = 6 * (to_x - x) / length, 6 * (to_y - y) / length
    head = (
        f"M{to_x - along_x - along_y / 2:.1f} {to_y - along_y + along_x / 2:.1f}L{to_x:.1f} {to_y:.1f}"
        f"L{to_x - along_x + along_y / 2:.1f} {to_y - along_y - along_x / 2:.1f}"
    )
    line = f"M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"
    return f'<path class="message" d="{line}{head}" fill="none" stroke="{_MESSAGE}" stroke-width="1.5"/>'


def _axis(y: float, *, scale: float, end: float) -> list[str]:
    parts = [f'<path d="M{_LEFT} {y:.1f}H{_LEFT + end * scale:.1f}" stroke="{_QUIET}"/>']
    every = max(1, math.ceil(end / 16))
    for tick in range(0, math.floor(end) + 1, every):
        x = _LEFT + tick * scale
        parts.append(f'<path d="M{x:.1f} {y:.1f}v5" stroke="{_QUIET}"/>')
        parts.append(_text(x, y + 18, str(tick), size=12, fill=_QUIET, anchor="middle"))
    words = "time, in forward passes of one stage over a whole batch"
    return [*parts, _text(_LEFT + end * scale / 2, y + 36, words, size=13, fill=_QUIET, anchor="middle")]


def _what_is_sent(flights: Sequence[Flight]) -> str:
    """Refreshed variables go up, outputs of the stages down; empty where nothing is sent ahead."""
    if not flights:
        return ""
    return "\u03bb\u2032" if flights[0].receiver < flights[0].sender else "X"


def _legend(y: float, *, has_aux: bool, sent: str) -> list[str]:
    entries = [(_FILL[FORWARD][0], "forward"), (_FILL[BACKWARD][0], "backward")]
    entries += [(_FILL[AUX][0], "AuxNet")] if has_aux else []
    entries += [(_IDLE, "idle")]
    parts, x = [], float(_LEFT)
    for colour, words in entries:
        parts.append(_rect(x, y - 12, 16, 14, fill=colour))
        parts.append(_text(x + 23, y, words, size=13))
        x += 23 + 8 * len(words) + 24
    parts.append(f'<path d="M{x + 4:.1f} {y - 14:.1f}v18" stroke="{_STEP}" stroke-width="3"/>')
    parts.append(_text(x + 14, y, "optimizer step", size=13))
    parts.append(_text(x + 128, y, "lighter: odd batches", size=13, fill=_QUIET))
    if sent:
        x += 270
        arrow = f"M{x:.1f} {y - 5:.1f}h20m-5 -4l5 4l-5 4"
        parts.append(f'<path d="{arrow}" fill="none" stroke="{_MESSAGE}" stroke-width="1.5"/>')
        parts.append(_text(x + 28, y, f"{sent} sent", size=13))
    return parts


def _rect(x: float, y: float, width: float, height: float, *, fill: str, edge: bool = False) -> str:
    border = ' stroke="#ffffff" stroke-width="0.8"' if edge else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{border}/>'


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: int,
    fill: str = _INK,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )
