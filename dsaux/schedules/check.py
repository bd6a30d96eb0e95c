"""Checks a schedule before anything runs: order, pairing, deadlock and buffers of all ranks together.

Used by the tests and by `python -m dsaux.schedules --check`. What instructions do is data (`effects`), who
waits for whom is replayed (`replay`); here stands what must be true of the contents::

    load -> forward -> backward -> reduce -> step       for each stage, each micro-batch exactly once
    slot: empty -> written -> read once by each kind of reader -> free to be written again
    batch b on stage k: in tick b, and one tick later for each boundary that its message has a tick to cross

Gradients of a kind are added to one buffer; what is reduced stays in it until the optimizer steps. A schedule whose
`overlap` is true has two of the AuxNet's::

    tick          t                          t + 1
    buffer 0      add add | sum ............ ........... | step
    buffer 1                                 add add | sum .........    at most one sum is under way
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dsaux.schedules import RUNS
from dsaux.schedules.effects import EFFECTS, Effect, Gradients, Message, Slot
from dsaux.schedules.fault import EffectTable, Place, ScheduleError
from dsaux.schedules.replay import Event, Ticks, join_ticks, replay

__all__ = ["Report", "ScheduleError", "check_named", "check_run", "check_schedule"]


@dataclass(frozen=True)
class Report:
    """What a schedule that passed consists of, counted over all ranks.

    Attributes:
        num_stages: ranks replayed.
        num_batches: batches that every stage treated.
        micro_batches: micro-batches in a batch.
        num_instructions: instructions of all ranks.
        num_messages: messages sent from stage to stage.
        num_collectives: collectives over all stages.
        num_buffers: pipeline buffers of each stage.
    """

    num_stages: int
    num_batches: int
    micro_batches: int
    num_instructions: int
    num_messages: int
    num_collectives: int
    num_buffers: tuple[int, ...]

    def __str__(self) -> str:
        buffers = "/".join(str(number) for number in self.num_buffers)
        return (
            f"stages {self.num_stages}, batches {self.num_batches}, micro-batches {self.micro_batches}, buffers "
            f"{buffers}, instructions {self.num_instructions}, messages {self.num_messages}, collectives over the "
            f"stages {self.num_collectives}: order, pairing and buffers are right, no deadlock"
        )


def check_named(name: str, micro_batches: int, num_stages: int, *, num_batches: int | None = None) -> Report:
    """Check a whole run of `RUNS`, fill and drain included.

    Args:
        name: its key.
        micro_batches: micro-batches in a batch.
        num_stages: number of stages.
        num_batches: batches to run; None for one more than stages, enough for a wavefront to fill and go on.

    Raises:
        ScheduleError: at the first fault.
        ValueError: if there is no such schedule.
    """
    if name not in RUNS:
        raise ValueError(f"schedule is {name!r}; allowed are {', '.join(sorted(RUNS))}.")
    batches = num_stages + 1 if num_batches is None else num_batches
    return check_run(
        lambda stage: RUNS[name](micro_batches, num_stages, stage, num_batches=batches), num_stages, num_batches=batches
    )


def check_schedule(make: Callable[[int], Any], num_stages: int, *, effects: EffectTable = EFFECTS) -> Report:
    """Replay all ranks of a schedule together, for one batch.

    Args:
        make: `make(stage_id)` gives the `PipeSchedule` of a stage.
        num_stages: number of stages.
        effects: what the instructions do; pass a larger table to check new instructions.

    Raises:
        ScheduleError: at the first fault, with rank, step, instruction and a grid around it.
    """
    return check_run(lambda stage: [make(stage)], num_stages, num_batches=1, effects=effects)


def check_run(
    make: Callable[[int], Sequence[Any]], num_stages: int, *, num_batches: int, effects: EffectTable = EFFECTS
) -> Report:
    """Replay all ranks together over several ticks.

    Args:
        make: `make(stage_id)` gives the `PipeSchedule` objects that a stage runs, one a tick.
        num_stages: number of stages.
        num_batches: batches that every stage is to treat.
        effects: what the instructions do; pass a larger table to check new instructions.

    Raises:
        ScheduleError: at the first fault, with rank, step (counted over all ticks), instruction and a grid around it.
    """
    schedules = [make(stage) for stage in range(num_stages)]
    ticks = join_ticks(schedules)
    buffers = tuple(max(int(schedule.num_pipe_buffers()) for schedule in its) for its in schedules)
    micro_batches = int(schedules[0][0].num_micro_batches)
    overlap = any(getattr(schedule, "overlap", False) for its in schedules for schedule in its)
    contents = _Contents(
        ticks,
        effects=effects,
        micro_batches=micro_batches,
        num_batches=num_batches,
        num_buffers=buffers,
        num_sums=2 if overlap else 1,
    )
    num_messages = num_collectives = 0
    for event in replay(ticks.streams, effects=effects):
        contents.apply(event)
        used = [effects[type(contents.instruction(place))] for place in event.done]
        num_messages += sum(effect.receives is not None for effect in used)
        num_collectives += sum(effect.collective is not None for effect in used)
    contents.finish()
    return Report(
        num_stages=num_stages,
        num_batches=num_batches,
        micro_batches=micro_batches,
        num_instructions=sum(len(step) for stream in ticks.streams for step in stream),
        num_messages=num_messages,
        num_collectives=num_collectives // num_stages,
        num_buffers=buffers,
    )


@dataclass
class _Content:
    """What a slot holds: a micro-batch's tensors, or those of several micro-batches of one batch."""

    micro_batches: set[int]
    writer: Place
    read_by: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    has_arrived: bool = True


@dataclass
class _Sum:
    """Gradients of one kind on one rank.

    Attributes:
        owed: micro-batches that ran forward and not yet backward.
        added: micro-batches in the buffer that is being filled.
        reduced: where the gradients that wait for a step were reduced; None if there are none.
        last_batch: the last batch that was reduced.
        num_reduced: reductions so far.
        num_steps: optimizer steps so far.
    """

    owed: dict[int, Place] = field(default_factory=dict)
    added: set[int] = field(default_factory=set)
    reduced: Place | None = None
    last_batch: int = -1
    num_reduced: int = 0
    num_steps: int = 0


class _Contents:
    """What lies in every slot of every rank, followed event by event; micro-batches are counted over the batches."""

    def __init__(
        self,
        ticks: Ticks,
        *,
        effects: EffectTable,
        micro_batches: int,
        num_batches: int,
        num_buffers: tuple[int, ...],
        num_sums: int,
    ) -> None:
        self.ticks, self.streams, self.effects = ticks, ticks.streams, effects
        self.micro_batches, self.num_batches = micro_batches, num_batches
        self.num_buffers, self.num_sums = num_buffers, num_sums
        kinds = [{type(cmd) for step in stream for cmd in step} for stream in self.streams]
        self.used = [{kind: effects[kind] for kind in its if kind in effects} for its in kinds]
        self.slots: list[dict[tuple[str, int], _Content]] = [{} for _ in self.streams]
        self.sums: list[dict[Gradients, _Sum]] = [defaultdict(_Sum) for _ in self.streams]
        self.versions: dict[tuple[Gradients, int], tuple[int, int]] = {}
        self.done: list[dict[str, set[int]]] = [{} for _ in self.streams]
        self.num_loaded = [0] * len(self.streams)
        self.carried: dict[Place, set[int]] = {}
        self.first_ticks = self._first_ticks()

    def instruction(self, place: Place) -> Any:
        return self.streams[place.rank][place.step][place.index]

    def apply(self, event: Event) -> None:
        """Follow the instructions of an event."""
        for place in event.done:
            self._apply(place, event)

    def _apply(self, place: Place, event: Event) -> None:
        cmd = self.instruction(place)
        effect = self.effects[type(cmd)]
        buffer_id = cmd.kwargs.get("buffer_id", 0)
        if not 0 <= buffer_id < self.num_buffers[place.rank]:
            self._fail(f"buffer {buffer_id} of {self.num_buffers[place.rank]} (num_pipe_buffers).", place)
        numbers = self._read(place, self._here(effect.reads, place), buffer_id)
        if effect.loads:
            numbers = {self._load(place)}
        if effect.receives is not None and effect.receives.blocking:
            numbers = self._received(place, event.done[0], numbers)
        if effect.awaits_send is not None or effect.awaits_receive is not None:
            self._in_time(place, event)
        if effect.awaits_receive is not None:
            numbers = self.carried[event.after[0]]
        if numbers and effect.awaits_send is None:
            self._in_its_tick(place, numbers)
        self.carried[place] = numbers
        for slot in self._here(effect.writes, place):
            if effect.awaits_receive is not None:
                self._arrive(place, _key(slot, buffer_id), numbers)
            elif numbers or effect.receives is not None:
                self._write(place, slot, buffer_id=buffer_id, numbers=numbers)
        for slot in self._here(effect.frees, place):
            self._overwrite(place, slot, buffer_id=buffer_id, verb="frees")
        if effect.once and numbers:
            self._once(place, cmd.name, min(numbers))
        self._follow_gradients(place, effect, min(numbers, default=None))

    def _here(self, slots: Sequence[Slot], place: Place) -> list[Slot]:
        return [slot for slot in slots if slot.where.includes(place.rank, len(self.streams))]

    def _batch(self, numbers: set[int]) -> int:
        return min(numbers) // self.micro_batches

    # ---- ticks ----------------------------------------------------------------------------------------------------

    def _first_ticks(self) -> list[int]:
        """The tick of batch 0 on each stage: later by its `ticks` for each boundary that a message crosses."""
        messages = [effect.sends for used in self.used for effect in used.values() if effect.sends is not None]
        lags = {message.to * message.ticks for message in messages if message.ticks > 0} or {0}
        assert len(lags) == 1, "the table has messages of different lags"
        first = [stage * min(lags) for stage in range(len(self.streams))]
        return [tick - min(first) for tick in first]

    def _in_its_tick(self, place: Place, numbers: set[int]) -> None:
        tick, batch = self.ticks.tick(place), self._batch(numbers)
        expected = self.first_ticks[place.rank] + batch
        if tick != expected:
            self._fail(
                f"batch {batch} in tick {tick}; stage {place.rank} of {len(self.streams)} has it in tick {expected}.",
                place,
            )

    def _in_time(self, place: Place, event: Event) -> None:
        """Both ends of a message start in one tick and are awaited a set number of ticks later."""
        send, receive = event.after
        message = self._message(send)
        sent, posted, awaited = (self.ticks.tick(its) for its in (send, receive, place))
        if posted != sent:
            self._fail(f"posted in tick {posted}, but rank {send.rank} sends it in tick {sent}.", receive)
        if awaited != sent + message.ticks:
            self._fail(
                f"awaits {message.name} in tick {awaited}; it was started in tick {sent} and is due in tick "
                f"{sent + message.ticks}.",
                place,
            )

    def _message(self, send: Place) -> Message:
        message = self.effects[type(self.instruction(send))].sends
        assert message is not None
        return message

    # ---- slots ----------------------------------------------------------------------------------------------------

    def _load(self, place: Place) -> int:
        number, total = self.num_loaded[place.rank], self._total()
        self.num_loaded[place.rank] += 1
        if number >= total:
            self._fail(f"loads micro-batch {number} of 0 to {total - 1}.", place)
        return number

    def _total(self) -> int:
        return self.micro_batches * self.num_batches

    def _read(self, place: Place, slots: Sequence[Slot], buffer_id: int) -> set[int]:
        """The micro-batch of the buffer's slots; for an instruction that reads none of them, all of a batch."""
        found: dict[str, int] = {}
        for slot in slots:
            if not slot.whole_batch:
                (number,) = self._take(place, slot, buffer_id, None)
                found[_name(slot, buffer_id)] = number
        if len(set(found.values())) > 1:
            mixed = ", ".join(f"{slot} of micro-batch {number}" for slot, number in found.items())
            self._fail(f"mixes micro-batches: {mixed}.", place)
        numbers = set(found.values())
        for slot in slots:
            if slot.whole_batch:
                numbers = self._take(place, slot, buffer_id, numbers or None)
        return numbers

    def _take(self, place: Place, slot: Slot, buffer_id: int, wanted: set[int] | None) -> set[int]:
        """Mark what is read, by default the whole content, which must be a whole batch where the slot is for one."""
        name, reader = _name(slot, buffer_id), self.instruction(place).name
        content = self.slots[place.rank].get(_key(slot, buffer_id))
        if content is None:
            self._fail(f"reads {name}, which nothing has written.", place)
        if not content.has_arrived:
            self._fail(f"reads {name}, which is still under way: its receive has not been awaited.", place)
        if wanted is None and slot.whole_batch:
            first = self._batch(content.micro_batches) * self.micro_batches
            wanted = set(range(first, first + self.micro_batches))
        wanted = content.micro_batches if wanted is None else wanted
        if missing := wanted - content.micro_batches:
            self._fail(
                f"reads {name} of micro-batch {_list(missing)}, but it holds micro-batch "
                f"{_list(content.micro_batches)}.",
                place,
            )
        if again := wanted & content.read_by[reader]:
            self._fail(f"reads {name} of micro-batch {_list(again)} a second time.", place)
        content.read_by[reader] |= wanted
        return set(wanted)

    def _received(self, place: Place, sender: Place, expected: set[int]) -> set[int]:
        numbers = self.carried[sender]
        if expected and expected != numbers:
            self._fail(
                f"gets micro-batch {_list(numbers)} from rank {sender.rank} (step {sender.step}), but its "
                f"buffer holds micro-batch {_list(expected)}.",
                place,
            )
        return numbers

    def _write(self, place: Place, slot: Slot, *, buffer_id: int, numbers: set[int]) -> None:
        """Put in a micro-batch, for a whole batch beside its others; nothing where a receive is posted."""
        content = self.slots[place.rank].get(_key(slot, buffer_id))
        if slot.whole_batch and numbers and content is not None:
            is_same_batch = self._batch(content.micro_batches) == self._batch(numbers)
            if is_same_batch and not content.micro_batches & numbers and not any(content.read_by.values()):
                content.micro_batches |= numbers
                return
        self._overwrite(place, slot, buffer_id=buffer_id, verb="overwrites")
        content = _Content(set(numbers), writer=place, has_arrived=bool(numbers))
        self.slots[place.rank][_key(slot, buffer_id)] = content

    def _arrive(self, place: Place, key: tuple[str, int], numbers: set[int]) -> None:
        content = self.slots[place.rank][key]
        content.micro_batches, content.has_arrived = set(numbers), True

    def _overwrite(self, place: Place, slot: Slot, *, buffer_id: int, verb: str) -> None:
        content = self.slots[place.rank].pop(_key(slot, buffer_id), None)
        if content is not None and (waiting := self._waiting(place.rank, slot.name, content)):
            self._fail(
                f"{verb} {_name(slot, buffer_id)} of micro-batch {_list(content.micro_batches)}, which "
                f"{', '.join(waiting)} still needs.",
                place,
            )

    def _waiting(self, rank: int, name: str, content: _Content) -> list[str]:
        readers = {
            kind.__name__
            for kind, effect in self.used[rank].items()
            if any(slot.name == name and slot.where.includes(rank, len(self.streams)) for slot in effect.reads)
        }
        return sorted(reader for reader in readers if content.micro_batches - content.read_by[reader])

    def _once(self, place: Place, name: str, number: int) -> None:
        done = self.done[place.rank].setdefault(name, set())
        if number in done:
            self._fail(f"micro-batch {number} a second time.", place)
        done.add(number)

    # ---- gradients ------------------------------------------------------------------------------------------------

    def _follow_gradients(self, place: Place, effect: Effect, number: int | None) -> None:
        if effect.owes is not None and number is not None:
            self.sums[place.rank][effect.owes].owed[number] = place
            self._right_version(place, effect.owes, number // self.micro_batches)
        if effect.adds is not None and number is not None:
            self._add(place, effect.adds, number)
        if effect.reduces is not None:
            self._reduce(place, effect.reduces)
        if effect.steps is not None:
            its = self.sums[place.rank][effect.steps]
            if its.reduced is None:
                self._fail(f"the gradients of {effect.steps.name} were not reduced since the last step.", place)
            if its.owed:
                self._fail(
                    f"steps {effect.steps.name} between the forward and the backward pass of micro-batch "
                    f"{_list(set(its.owed))}.",
                    place,
                )
            its.reduced = None
            its.num_steps += 1

    def _right_version(self, place: Place, gradients: Gradients, batch: int) -> None:
        """A stage's weights must have taken one step for each batch before; copies of one net, equally many."""
        num_steps, tick = self.sums[place.rank][gradients].num_steps, self.ticks.tick(place)
        if gradients.replicated:
            others, rank = self.versions.setdefault((gradients, tick), (num_steps, place.rank))
            if others != num_steps:
                self._fail(
                    f"uses {gradients.name} after {num_steps} of its steps, but rank {rank} after {others} in the "
                    f"same tick {tick}: the copies part.",
                    place,
                )
        elif num_steps != batch and any(effect.steps == gradients for effect in self.used[place.rank].values()):
            self._fail(f"uses {gradients.name} after {num_steps} of its steps; batch {batch} needs {batch}.", place)

    def _add(self, place: Place, gradients: Gradients, number: int) -> None:
        its = self.sums[place.rank][gradients]
        is_busy = its.reduced is not None and (self.num_sums == 1 or not gradients.replicated)
        if is_busy or number // self.micro_batches <= its.last_batch:
            self._fail(f"adds to the gradients of {gradients.name} after their reduction.", place)
        its.owed.pop(number, None)
        its.added.add(number)

    def _reduce(self, place: Place, gradients: Gradients) -> None:
        its, name = self.sums[place.rank][gradients], gradients.name
        if its.owed:
            self._fail(f"the backward pass of micro-batch {_list(set(its.owed))} has not run yet.", place)
        if its.reduced is not None:
            self._fail(
                f"reduces gradients of {name}, while no step has used those that were reduced in step "
                f"{its.reduced.step}.",
                place,
            )
        if gradients.replicated and its.num_reduced != self.ticks.tick(place):
            self._fail(
                f"reduction {its.num_reduced} of {name} in tick {self.ticks.tick(place)}; every tick has one.", place
            )
        batches = {number // self.micro_batches for number in its.added}
        if len(batches) > 1 or (not batches and not gradients.replicated):
            self._fail(f"reduces gradients of {name} of {len(batches)} batches; a step is for one.", place)
        its.reduced, its.added = place, set()
        its.last_batch = max(batches, default=its.last_batch)
        its.num_reduced += 1

    # ---- the end --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """What may not be missing or left over at the end of the streams."""
        once = {kind.__name__ for used in self.used for kind, effect in used.items() if effect.once}
        for rank in range(len(self.streams)):
            end = self._end(rank)
            for name in sorted(once):
                count = len(self.done[rank].get(name, ()))
                if count != self._total():
                    self._fail(f"{name} ran on {count} of {self._total()} micro-batches.", end)
            for gradients, its in self.sums[rank].items():
                if its.added or its.reduced is not None:
                    self._fail(f"the gradients of {gradients.name} are never used: the optimizer step is missing.", end)
                if gradients.replicated and its.num_steps != len(self.ticks.starts):
                    self._fail(
                        f"{gradients.name} took {its.num_steps} steps in {len(self.ticks.starts)} ticks; every tick "
                        "has one.",
                        end,
                    )
            for (name, _), content in self.slots[rank].items():
                if waiting := self._waiting(rank, name, content):
                    self._fail(
                        f"{name} of micro-batch {_list(content.micro_batches)}, written in step "
                        f"{content.writer.step}, was never read by {', '.join(waiting)}.",
                        end,
                    )

    def _end(self, rank: int) -> Place:
        stream = self.streams[rank]
        return Place(rank, len(stream) - 1, len(stream[-1]))

    def _fail(self, message: str, place: Place) -> NoReturn:
        raise ScheduleError(message, place=place, streams=self.streams, effects=self.effects)


def _key(slot: Slot, buffer_id: int) -> tuple[str, int]:
    return slot.name, -1 if slot.per_rank or slot.whole_batch else buffer_id


def _name(slot: Slot, buffer_id: int) -> str:
    return slot.name if slot.per_rank or slot.whole_batch else f"{slot.name}[{buffer_id}]"


def _list(numbers: set[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))
