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

from dsaux.schedules import RUNS
from dsaux.schedules import instructions as ins
from dsaux.schedules.effects import EFFECTS
from dsaux.schedules.fault import Place
from dsaux.schedules.replay import Event, Ticks, join_ticks, replay

BACKWARD_COST = 2.0
"""A backward pass takes about twice the forward pass: gradients by the weights and by the input."""

# A ResNet ties no weights over stages, so ReduceTiedGrads has nothing to wait for.
_EFFECTS = {
    **EFFECTS,
    ins.ReduceTiedGrads: dataclasses.replace(EFFECTS[ins.ReduceTiedGrads], collective=None),
}

FORWARD, BACKWARD, AUX, STEP = "forward", "backward", "aux", "step"
_TITLES = {
    "1f1b": "DeepSpeed 1F1B",
    "penalty": "dsaux penalty",
    "al": "dsaux augmented Lagrangian (al)",
    "al-overlap": "dsaux augmented Lagrangian (al-overlap)",
    "local": "dsaux greedy local losses (local)",
}
_KINDS: Mapping[type[ins.PipeInstruction], str] = {
    ins.ForwardPass: FORWARD,
    ins.LocalForward: FORWARD,
    ins.ReceivedForward: FORWARD,
    ins.BackwardPass: BACKWARD,
    ins.LocalBackward: BACKWARD,
    ins.HeadBackward: BACKWARD,
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
        step: step of the schedule, counted over all ticks.
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
class Flight:
    """A message that crosses a boundary while both its stages compute.

    Attributes:
        batch: number of its batch.
        sender: the stage that sends it.
        receiver: the stage that uses it.
        start: when the send starts.
        end: when the receiver is ready to use it.
    """

    batch: int
    sender: int
    receiver: int
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
        num_ticks: ticks in which they pass, fill and drain included.
        num_steps: steps of the schedule in all ticks.
        aux_share: cost of the AuxNet on a rank as a share of its stage's.
        pieces: in the order of each rank.
        flights: messages that travel while their stages compute.
    """

    name: str
    num_stages: int
    micro_batches: int
    num_batches: int
    num_ticks: int
    num_steps: int
    aux_share: float
    pieces: tuple[Piece, ...]
    flights: tuple[Flight, ...] = ()

    @property
    def end(self) -> float:
        """When the last rank ends its last batch."""
        return max(piece.end for piece in self.pieces)

    @property
    def period(self) -> float:
        """Time between two batches on a stage, once it has the first one."""
        steps = [piece.end for piece in self.pieces if piece.kind == STEP and piece.stage == 0]
        return (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else self.end

    @property
    def has_fill(self) -> bool:
        """Whether some stages have no batch in the first ticks and others none in the last."""
        return self.num_ticks > self.num_batches

    @property
    def idle_share(self) -> float:
        """Share of all ranks' time from start to end in which they compute nothing, fill and drain counted."""
        return self.idle_share_until(self.end)

    def idle_share_until(self, end: float) -> float:
        """The same from the start to a time before the end."""
        busy = sum(max(0.0, min(piece.end, end) - piece.start) for piece in self.pieces)
        return max(0.0, 1.0 - busy / (self.num_stages * end))


def simulate(name: str, *, num_stages: int, micro_batches: int, num_batches: int, aux_share: float = 0.1) -> Timeline:
    """Run a schedule of `RUNS` for some batches, fill and drain included.

    Args:
        name: its key.
        num_stages: number of stages.
        micro_batches: micro-batches in a batch; the work of a batch is the same for any number.
        num_batches: batches to run.
        aux_share: cost of the AuxNet on a rank as a share of its stage's, taken as the same on every rank.
    """
    ticks = join_ticks(
        [RUNS[name](micro_batches, num_stages, stage, num_batches=num_batches) for stage in range(num_stages)]
    )
    clock = _Clock(ticks, micro_batches=micro_batches, aux_share=aux_share)
    for event in replay(ticks.streams, effects=_EFFECTS):
        clock.advance(event)
    return Timeline(
        name=name,
        num_stages=num_stages,
        micro_batches=micro_batches,
        num_batches=num_batches,
        num_ticks=len(ticks.starts),
        num_steps=ticks.num_steps,
        aux_share=aux_share,
        pieces=tuple(clock.pieces),
        flights=tuple(clock.flights),
    )


def title(timeline: Timeline, end: float | None = None) -> str:
    """Heading of a timeline: what it shows, with the idle share that the simulation gave.

    Args:
        timeline: what is drawn.
        end: where the drawing is cut; None for the whole run.
    """
    name = _TITLES.get(timeline.name, timeline.name)
    cut = "whole batches" if timeline.micro_batches == 1 else f"{timeline.micro_batches} micro-batches"
    idle_share = timeline.idle_share_until(timeline.end if end is None else end)
    return f"{name}, {cut}: {100 * idle_share:.0f} % idle"


def rhythm(timeline: Timeline) -> str:
    """How often a batch ends; for a wavefront in its steady state, when all stages have one."""
    return f"a batch every {timeline.period:.2f}{' once filled' if timeline.has_fill else ''}"


class _Clock:
    """The time on every rank, driven by replayed events."""

    def __init__(self, ticks: Ticks, *, micro_batches: int, aux_share: float) -> None:
        self.streams, self.micro_batches = ticks.streams, micro_batches
        forward, backward = 1.0 / micro_batches, BACKWARD_COST / micro_batches
        self.costs: dict[type[ins.PipeInstruction], float] = {
            ins.ForwardPass: forward,
            ins.LocalForward: forward,
            ins.ReceivedForward: forward,
            ins.BackwardPass: backward,
            ins.LocalBackward: backward,
            ins.HeadBackward: backward,
            ins.AuxForward: aux_share * forward,
            ins.AuxBackward: aux_share * backward,
        }
        if len(self.streams) == 1:
            self.costs |= {ins.AuxForward: 0.0, ins.AuxBackward: 0.0}
        self.now = [0.0] * len(self.streams)
        self.ended: dict[Place, float] = {}
        self.counts: list[Counter[str]] = [Counter() for _ in self.streams]
        self.pieces: list[Piece] = []
        self.flights: list[Flight] = []

    def advance(self, event: Event) -> None:
        """Let the instructions of an event start together, at the latest time of all it depends on."""
        start = max([*(self.now[its.rank] for its in event.done), *(self.ended[its] for its in event.after)])
        for place in event.done:
            cmd = place.instruction(self.streams)
            end = start + self.costs.get(type(cmd), 0.0)
            self.now[place.rank] = self.ended[place] = end
            if type(cmd) in _KINDS:
                self._record(place, type(cmd), start=start, end=end)
            if _EFFECTS[type(cmd)].awaits_receive is not None:
                self._record_flight(place, event.after[0])

    def _record(self, place: Place, kind: type[ins.PipeInstruction], *, start: float, end: float) -> None:
        name = kind.__name__
        per_batch = 1 if _KINDS[kind] == STEP else self.micro_batches
        batch, micro_batch = divmod(self.counts[place.rank][name], per_batch)
        self.counts[place.rank][name] += 1
        self.pieces.append(Piece(place.rank, _KINDS[kind], name, batch, micro_batch, place.step, start=start, end=end))

    def _record_flight(self, place: Place, send: Place) -> None:
        batch = self.counts[place.rank]["flights"]
        self.counts[place.rank]["flights"] += 1
        self.flights.append(
            Flight(batch, sender=send.rank, receiver=place.rank, start=self.ended[send], end=self.ended[place])
        )
