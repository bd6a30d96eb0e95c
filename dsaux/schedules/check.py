"""Checks a schedule before anything runs: order, pairing, deadlock and buffers of all ranks together.

Used by the tests and by `python -m dsaux.schedules --check`. What instructions do is data (`effects`), who
waits for whom is replayed (`replay`); here stands what must be true of the contents::

    load -> forward -> backward -> reduce -> step       for each stage, each micro-batch exactly once
    slot: empty -> written -> read once by each kind of reader -> free to be written again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dsaux.schedules import SCHEDULES
from dsaux.schedules.effects import EFFECTS, Slot
from dsaux.schedules.fault import EffectTable, Place, ScheduleError, Stream
from dsaux.schedules.replay import Event, replay

__all__ = ["Report", "ScheduleError", "check_named", "check_schedule"]


@dataclass(frozen=True)
class Report:
    """What a schedule that passed consists of, counted over all ranks.

    Attributes:
        num_stages: ranks replayed.
        micro_batches: micro-batches of the schedule.
        num_instructions: instructions of all ranks.
        num_messages: tensors sent from stage to stage.
        num_collectives: collectives over all stages.
        num_buffers: pipeline buffers of each stage.
    """

    num_stages: int
    micro_batches: int
    num_instructions: int
    num_messages: int
    num_collectives: int
    num_buffers: tuple[int, ...]

    def __str__(self) -> str:
        buffers = "/".join(str(number) for number in self.num_buffers)
        return (
            f"stages {self.num_stages}, micro-batches {self.micro_batches}, buffers {buffers}, instructions "
            f"{self.num_instructions}, messages {self.num_messages}, collectives over the stages "
            f"{self.num_collectives}: order, pairing and buffers are right, no deadlock"
        )


def check_named(name: str, micro_batches: int, num_stages: int) -> Report:
    """Check a schedule of `SCHEDULES`.

    Args:
        name: its key.
        micro_batches: micro-batches in a batch.
        num_stages: number of stages.

    Raises:
        ScheduleError: at the first fault.
        ValueError: if there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}; allowed are {', '.join(sorted(SCHEDULES))}.")
    kind = SCHEDULES[name]
    return check_schedule(lambda stage: kind(micro_batches, num_stages, stage), num_stages)


def check_schedule(make: Callable[[int], Any], num_stages: int, *, effects: EffectTable = EFFECTS) -> Report:
    """Replay all ranks of a schedule together.

    Args:
        make: `make(stage_id)` gives the `PipeSchedule` of a stage.
        num_stages: number of stages.
        effects: what the instructions do; pass a larger table to check new instructions.

    Raises:
        ScheduleError: at the first fault, with rank, step, instruction and a grid around it.
    """
    schedules = [make(stage) for stage in range(num_stages)]
    streams: list[Stream] = [[list(cmds) for cmds in schedule] for schedule in schedules]
    buffers = tuple(int(schedule.num_pipe_buffers()) for schedule in schedules)
    micro_batches = int(schedules[0].num_micro_batches)
    contents = _Contents(streams, effects=effects, micro_batches=micro_batches, num_buffers=buffers)
    num_messages = num_collectives = 0
    for event in replay(streams, effects=effects):
        contents.apply(event)
        used = [effects[type(contents.instruction(place))] for place in event.done]
        num_messages += sum(effect.receives is not None for effect in used)
        num_collectives += sum(effect.collective is not None for effect in used)
    contents.finish()
    return Report(
        num_stages=num_stages,
        micro_batches=micro_batches,
        num_instructions=sum(len(step) for stream in streams for step in stream),
        num_messages=num_messages,
        num_collectives=num_collectives // num_stages,
        num_buffers=buffers,
    )


@dataclass
class _Content:
    """One micro-batch's tensors in a slot."""

    micro_batch: int
    writer: Place
    read_by: set[str] = field(default_factory=set)


@dataclass
class _Gradients:
    """Gradients of one kind on one rank, from the first added to the optimizer step."""

    owed: dict[int, Place] = field(default_factory=dict)
    last_added: Place | None = None
    final: bool = False


class _Contents:
    """What lies in every slot of every rank, followed event by event."""

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        effects: EffectTable,
        micro_batches: int,
        num_buffers: tuple[int, ...],
    ) -> None:
        self.streams, self.effects = streams, effects
        self.micro_batches, self.num_buffers = micro_batches, num_buffers
        kinds = [{type(cmd) for step in stream for cmd in step} for stream in streams]
        self.used = [{kind: effects[kind] for kind in its if kind in effects} for its in kinds]
        self.slots: list[dict[tuple[str, int], _Content]] = [{} for _ in streams]
        self.gradients: list[dict[str, _Gradients]] = [{} for _ in streams]
        self.done: list[dict[str, set[int]]] = [{} for _ in streams]
        self.num_loaded = [0] * len(streams)
        self.micro_batch_at: dict[Place, int] = {}

    def instruction(self, place: Place) -> Any:
        return self.streams[place.rank][place.step][place.index]

    def apply(self, event: Event) -> None:
        """Follow the instructions of an event; a send stands before its receive."""
        sender = event.done[0] if len(event.done) > 1 else event.after[0] if event.after else None
        for place in event.done:
            self._apply(place, sender)

    def _apply(self, place: Place, sender: Place | None) -> None:
        cmd = self.instruction(place)
        effect = self.effects[type(cmd)]
        buffer_id = cmd.kwargs.get("buffer_id", 0)
        if not 0 <= buffer_id < self.num_buffers[place.rank]:
            self._fail(f"buffer {buffer_id} of {self.num_buffers[place.rank]} (num_pipe_buffers).", place)
        micro_batch = self._read(place, self._here(effect.reads, place), buffer_id)
        if effect.loads:
            micro_batch = self.num_loaded[place.rank]
            self.num_loaded[place.rank] += 1
            if micro_batch >= self.micro_batches:
                self._fail(f"loads micro-batch {micro_batch} of 0 to {self.micro_batches - 1}.", place)
        if effect.receives is not None and sender is not None:
            micro_batch = self._received(place, sender, micro_batch)
        if micro_batch is not None:
            self.micro_batch_at[place] = micro_batch
            for slot in self._here(effect.writes, place):
                self._write(place, slot, buffer_id=buffer_id, micro_batch=micro_batch)
            if effect.once:
                self._once(place, cmd.name, micro_batch)
        self._follow_gradients(place, micro_batch)

    def _here(self, slots: Sequence[Slot], place: Place) -> list[Slot]:
        return [slot for slot in slots if slot.where.includes(place.rank, len(self.streams))]

    def _read(self, place: Place, slots: Sequence[Slot], buffer_id: int) -> int | None:
        name = self.instruction(place).name
        found: dict[str, int] = {}
        for slot in slots:
            content = self.slots[place.rank].get(_key(slot, buffer_id))
            if content is None:
                self._fail(f"reads {_name(slot, buffer_id)}, which nothing has written.", place)
            if name in content.read_by:
                self._fail(
                    f"reads {_name(slot, buffer_id)} of micro-batch {content.micro_batch} a second time.",
                    place,
                )
            content.read_by.add(name)
            found[_name(slot, buffer_id)] = content.micro_batch
        if len(set(found.values())) > 1:
            mixed = ", ".join(f"{slot} of micro-batch {number}" for slot, number in found.items())
            self._fail(f"mixes micro-batches: {mixed}.", place)
        return next(iter(found.values()), None)

    def _received(self, place: Place, sender: Place, expected: int | None) -> int:
        micro_batch = self.micro_batch_at[sender]
        if expected is not None and expected != micro_batch:
            self._fail(
                f"gets micro-batch {micro_batch} from rank {sender.rank} (step {sender.step}), but its "
                f"buffer holds micro-batch {expected}.",
                place,
            )
        return micro_batch

    def _write(self, place: Place, slot: Slot, *, buffer_id: int, micro_batch: int) -> None:
        content = self.slots[place.rank].get(_key(slot, buffer_id))
        if content is not None and (waiting := self._waiting(place.rank, slot.name, content)):
            self._fail(
                f"overwrites {_name(slot, buffer_id)} of micro-batch {content.micro_batch}, which "
                f"{', '.join(waiting)} still needs.",
                place,
            )
        self.slots[place.rank][_key(slot, buffer_id)] = _Content(micro_batch, writer=place)

    def _waiting(self, rank: int, name: str, content: _Content) -> list[str]:
        readers = {
            kind.__name__
            for kind, effect in self.used[rank].items()
            if any(slot.name == name and slot.where.includes(rank, len(self.streams)) for slot in effect.reads)
        }
        return sorted(readers - content.read_by)

    def _once(self, place: Place, name: str, micro_batch: int) -> None:
        done = self.done[place.rank].setdefault(name, set())
        if micro_batch in done:
            self._fail(f"micro-batch {micro_batch} a second time.", place)
        done.add(micro_batch)

    def _follow_gradients(self, place: Place, micro_batch: int | None) -> None:
        effect = self.effects[type(self.instruction(place))]
        if effect.owes is not None and micro_batch is not None:
            self._gradients(place, effect.owes).owed[micro_batch] = place
        if effect.adds is not None and micro_batch is not None:
            gradients = self._gradients(place, effect.adds)
            if gradients.final:
                self._fail(f"adds to the gradients of {effect.adds} after their reduction.", place)
            gradients.owed.pop(micro_batch, None)
            gradients.last_added = place
        if effect.reduces is not None:
            gradients = self._gradients(place, effect.reduces)
            if gradients.owed:
                missing = ", ".join(str(number) for number in sorted(gradients.owed))
                self._fail(f"the backward pass of micro-batch {missing} has not run yet.", place)
            gradients.final = True
        if effect.steps is not None:
            if not self._gradients(place, effect.steps).final:
                self._fail(f"the gradients of {effect.steps} were not reduced since the last step.", place)
            self.gradients[place.rank][effect.steps] = _Gradients()

    def _gradients(self, place: Place, name: str) -> _Gradients:
        return self.gradients[place.rank].setdefault(name, _Gradients())

    def finish(self) -> None:
        """What may not be left over at the end of the streams."""
        trained = {effect.adds for used in self.used for effect in used.values()}
        once = {kind.__name__ for used in self.used for kind, effect in used.items() if effect.once}
        for rank, stream in enumerate(self.streams):
            end = Place(rank, max(0, len(stream) - 1), len(stream[-1]) if stream else 0)
            for name in sorted(once):
                count = len(self.done[rank].get(name, ()))
                if count != self.micro_batches:
                    self._fail(f"{name} ran on {count} of {self.micro_batches} micro-batches.", end)
            for name, gradients in self.gradients[rank].items():
                if name in trained and (gradients.last_added is not None or gradients.final):
                    self._fail(f"the gradients of {name} are never used: the optimizer step is missing.", end)
            for (name, _), content in self.slots[rank].items():
                if waiting := self._waiting(rank, name, content):
                    self._fail(
                        f"{name} of micro-batch {content.micro_batch}, written in step "
                        f"{content.writer.step}, was never read by {', '.join(waiting)}.",
                        end,
                    )

    def _fail(self, message: str, place: Place) -> NoReturn:
        raise ScheduleError(message, place=place, streams=self.streams, effects=self.effects)


def _key(slot: Slot, buffer_id: int) -> tuple[str, int]:
    return slot.name, -1 if slot.per_rank else buffer_id


def _name(slot: Slot, buffer_id: int) -> str:
    return slot.name if slot.per_rank else f"{slot.name}[{buffer_id}]"
