"""When each rank computes what, from the instruction streams and the cost of each computation.

Simulated with the messages and collectives of `replay`: a rank that waits is idle. Unit of time: one stage's
forward pass over a whole batch. Stages are taken as equally long, transfers and optimizer steps as free: idle
time is the schedule's own. `draw` and `picture` draw the result.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dsaux.schedules import SCHEDULES
from dsaux.schedules import instructions as ins
from dsaux.schedules.effects import EFFECTS
from dsaux.schedules.fault import Place, Stream
from dsaux.schedules.replay import Event, replay

BACKWARD_COST = 2.0
"""A backward pass takes about twice the forward pass: gradients by the weights and by the input."""

# A ResNet ties no weights over stages, so ReduceTiedGrads has nothing to wait for.
_EFFECTS = {
    **EFFECTS,
    ins.ReduceTiedGrads: dataclasses.replace(EFFECTS[ins.ReduceTiedGrads], collective=None),
}

FORWARD, BACKWARD, AUX, STEP = "forward", "backward", "aux", "step"
_TITLES = {"1f1b": "DeepSpeed 1F1B", "penalty": "dsaux penalty"}
_KINDS: Mapping[type[ins.PipeInstruction], str] = {
    ins.ForwardPass: FORWARD,
    ins.LocalForward: FORWARD,
    ins.BackwardPass: BACKWARD,
    ins.LocalBackward: BACKWARD,
    ins.AuxForward: AUX,
    ins.AuxBackward: AUX,
    ins.OptimizerStep: STEP,
}


@dataclass(frozen=True)
class Piece:
    """One computation of one stage.

    Attributes:
        stage: which stage.
        kind: `forward`, `backward`, `aux` (the AuxNet, either way) or `step` (no length).
        name: the instruction.
        batch: number of the batch.
        micro_batch: number within the batch.
        step: step of the schedule, counted over all batches.
        start: in forward passes of a stage over a batch.
        end: the same.
    """

    stage: int
    kind: str
    name: str
    batch: int
    micro_batch: int
    step: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All pieces of some batches of a schedule.

    Attributes:
        name: the schedule's name.
        num_stages: number of stages.
        micro_batches: micro-batches in a batch.
        num_batches: batches.
        num_steps: steps of the schedule in all batches.
        aux_share: cost of the AuxNet on a rank as a share of its stage's.
        pieces: in the order of each rank.
    """

    name: str
    num_stages: int
    micro_batches: int
    num_batches: int
    num_steps: int
    aux_share: float
    pieces: tuple[Piece, ...]

    @property
    def end(self) -> float:
        """When the last rank ends its last batch."""
        return max(piece.end for piece in self.pieces)

    @property
    def idle_share(self) -> float:
        """Share of all ranks' time from start to end in which they compute nothing."""
        busy = sum(piece.end - piece.start for piece in self.pieces)
        return max(0.0, 1.0 - busy / (self.num_stages * self.end))


def simulate(name: str, *, num_stages: int, micro_batches: int, num_batches: int, aux_share: float = 0.1) -> Timeline:
    """Run a schedule of `SCHEDULES` for some batches, one after the other.

    Args:
        name: its key.
        num_stages: number of stages.
        micro_batches: micro-batches in a batch; the work of a batch is the same for any number.
        num_batches: batches to run.
        aux_share: cost of the AuxNet on a rank as a share of its stage's, taken as the same on every rank.
    """
    streams: list[Stream] = []
    for stage in range(num_stages):
        schedule = SCHEDULES[name](micro_batches, num_stages, stage)
        streams.append([list(cmds) for _ in range(num_batches) for cmds in schedule])
    clock = _Clock(streams, micro_batches=micro_batches, aux_share=aux_share)
    for event in replay(streams, effects=_EFFECTS):
        clock.advance(event)
    return Timeline(
        name=name,
        num_stages=num_stages,
        micro_batches=micro_batches,
        num_batches=num_batches,
        num_steps=len(streams[0]),
        aux_share=aux_share,
        pieces=tuple(clock.pieces),
    )


def title(timeline: Timeline) -> str:
    """Heading of a timeline: what it shows, with the idle share that the simulation gave."""
    name = _TITLES.get(timeline.name, timeline.name)
    cut = "whole batches" if timeline.micro_batches == 1 else f"{timeline.micro_batches} micro-batches"
    return f"{name}, {cut}: {100 * timeline.idle_share:.0f} % idle"


class _Clock:
    """The time on every rank, driven by replayed events."""

    def __init__(self, streams: list[Stream], *, micro_batches: int, aux_share: float) -> None:
        self.streams, self.micro_batches = streams, micro_batches
        forward, backward = 1.0 / micro_batches, BACKWARD_COST / micro_batches
        self.costs: dict[type[ins.PipeInstruction], float] = {
            ins.ForwardPass: forward,
            ins.LocalForward: forward,
            ins.BackwardPass: backward,
            ins.LocalBackward: backward,
            ins.AuxForward: aux_share * forward,
            ins.AuxBackward: aux_share * backward,
        }
        if len(streams) == 1:
            self.costs |= {ins.AuxForward: 0.0, ins.AuxBackward: 0.0}
        self.now = [0.0] * len(streams)
        self.ended: dict[Place, float] = {}
        self.counts: list[Counter[str]] = [Counter() for _ in streams]
        self.pieces: list[Piece] = []

    def advance(self, event: Event) -> None:
        """Let the instructions of an event start together, at the latest time of all it depends on."""
        start = max([*(self.now[its.rank] for its in event.done), *(self.ended[its] for its in event.after)])
        for place in event.done:
            cmd = place.instruction(self.streams)
            end = start + self.costs.get(type(cmd), 0.0)
            self.now[place.rank] = self.ended[place] = end
            if type(cmd) in _KINDS:
                self._record(place, type(cmd), start=start, end=end)

    def _record(self, place: Place, kind: type[ins.PipeInstruction], *, start: float, end: float) -> None:
        name = kind.__name__
        per_batch = 1 if _KINDS[kind] == STEP else self.micro_batches
        batch, micro_batch = divmod(self.counts[place.rank][name], per_batch)
        self.counts[place.rank][name] += 1
        self.pieces.append(Piece(place.rank, _KINDS[kind], name, batch, micro_batch, place.step, start=start, end=end))
