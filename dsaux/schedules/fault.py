"""The error of a faulty schedule: rank, step, instruction, and a grid of all ranks with the fault marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dsaux.schedules.effects import EFFECTS, Effect
from dsaux.schedules.instructions import PipeInstruction

Stream: TypeAlias = Sequence[Sequence[PipeInstruction]]
"""One rank's instructions: steps, each a list."""
EffectTable: TypeAlias = Mapping[type[PipeInstruction], Effect]

GRID_STEPS = 4
"""Steps before and after the faulty one that an error's grid shows."""


@dataclass(frozen=True)
class Place:
    """One instruction of one rank, `streams[rank][step][index]`; an index past the last is the step's end."""

    rank: int
    step: int
    index: int

    def instruction(self, streams: Sequence[Stream]) -> PipeInstruction | None:
        """What stands there; None at a step's end."""
        stream = streams[self.rank]
        if self.step < len(stream) and self.index < len(stream[self.step]):
            return stream[self.step][self.index]
        return None


class ScheduleError(Exception):
    """A schedule that can't run, or would compute something else than it says.

    Attributes:
        rank: rank of the faulty instruction.
        step: its step in that rank's stream.
        instruction: the instruction; None if something is missing at the end of the stream.
    """

    def __init__(
        self, message: str, *, place: Place, streams: Sequence[Stream], effects: EffectTable = EFFECTS
    ) -> None:
        self.rank, self.step = place.rank, place.step
        self.instruction = place.instruction(streams)
        found = "end of the stream" if self.instruction is None else repr(self.instruction)
        grid = fault_grid(streams, place, effects=effects)
        super().__init__(f"rank {place.rank}, step {place.step}, {found}: {message}\n\n{grid}")


def fault_grid(streams: Sequence[Stream], place: Place, *, effects: EffectTable = EFFECTS) -> str:
    """Draw the streams around `place`: a row per rank, a column per step, the faulty instruction as ``>F0<``.

    ::

        step      0         1
        rank 0    L0 F0     sA0
        rank 1              >F0< rA0
    """
    first = max(0, place.step - GRID_STEPS)
    last = min(max(len(stream) for stream in streams), place.step + GRID_STEPS + 1)
    rows = [["step", *(str(step) for step in range(first, last))]]
    for rank, stream in enumerate(streams):
        cells = [_cell(stream, rank, step, mark=place, effects=effects) for step in range(first, last)]
        rows.append([f"rank {rank}", *cells])
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    used = {type(cmd) for stream in streams for step in stream for cmd in step}
    legend = ", ".join(f"{effects[kind].code} {kind.__name__}" for kind in effects if kind in used)
    return "\n".join([*("".join(row).rstrip() for row in padded), f"({legend}; the number is the buffer)"])


def _cell(stream: Stream, rank: int, step: int, *, mark: Place, effects: EffectTable) -> str:
    cmds = stream[step] if step < len(stream) else []
    parts = []
    for index, cmd in enumerate(cmds):
        code = effects[type(cmd)].code if type(cmd) in effects else cmd.name
        text = f"{code}{cmd.kwargs.get('buffer_id', '')}"
        parts.append(f">{text}<" if Place(rank, step, index) == mark else text)
    if (mark.rank, mark.step) == (rank, step) and mark.index >= len(cmds):
        parts.append(">end<")
    return " ".join(parts) or "."
