"""Replays the instruction streams of all ranks together: who can go on when, and who waits for whom.

Each rank runs its stream in order, as DeepSpeed's `_exec_schedule` does. A blocking send and its receive end
together, at the time the later of the two is reached. `check` looks at what the instructions do, `timeline`
at how long they take.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsaux.schedules.effects import EFFECTS, Collective, Effect, Message
from dsaux.schedules.fault import EffectTable, Place, ScheduleError, Stream


@dataclass(frozen=True)
class Event:
    """Instructions that end together, and those of other ranks that had to end before."""

    done: tuple[Place, ...]
    after: tuple[Place, ...] = ()


def replay(streams: Sequence[Stream], *, effects: EffectTable = EFFECTS) -> Iterator[Event]:
    """Run all streams to their end.

    Args:
        streams: instructions of rank 0, 1, ...
        effects: what the instructions do.

    Yields:
        Events in an order in which they can happen; events of one rank are in the order of its stream.

    Raises:
        ScheduleError: on a deadlock, a message that its receiver does not expect, or collectives that differ.
    """
    state = _Replay(streams, effects)
    running = deque(range(len(streams)))
    while running:
        rank = running.popleft()
        event = state.try_next(rank)
        if event is None:
            continue
        yield event
        # Whoever may wait for one of these ranks gets another look.
        running.extend(other for other in range(len(streams)) if other not in running)
    state.raise_if_stuck()


class _Replay:
    """Where every rank stands, and what is under way between them."""

    def __init__(self, streams: Sequence[Stream], effects: EffectTable) -> None:
        self.streams, self.effects = streams, effects
        self.places = [
            [Place(rank, step, index) for step, cmds in enumerate(stream) for index in range(len(cmds))]
            for rank, stream in enumerate(streams)
        ]
        self.position = [0] * len(streams)
        self.in_flight: dict[tuple[int, int, str], deque[tuple[Message, Place]]] = defaultdict(deque)
        self.collectives: list[list[tuple[str, Place]]] = [[] for _ in streams]
        self._raise_if_unpaired()

    def try_next(self, rank: int) -> Event | None:
        """End the rank's next instruction and what ends with it; None if it must wait or there is none."""
        place = self.current(rank)
        if place is None:
            return None
        effect = self.effect(place)
        if effect.collective is not None:
            return self._try_collective(place, effect.collective)
        if effect.waits is not None:
            return self._try_wait(place, effect.waits)
        if effect.sends is not None:
            return self._try_send(place, effect.sends)
        if effect.receives is not None:
            return self._try_receive(place, effect.receives)
        return self._end(place)

    def current(self, rank: int) -> Place | None:
        """The rank's next instruction."""
        position = self.position[rank]
        return self.places[rank][position] if position < len(self.places[rank]) else None

    def effect(self, place: Place) -> Effect:
        """Its entry in the table."""
        cmd = place.instruction(self.streams)
        if type(cmd) not in self.effects:
            raise self.error("this instruction has no entry in the table of effects.", place)
        return self.effects[type(cmd)]

    def error(self, message: str, place: Place) -> ScheduleError:
        """The error to raise."""
        return ScheduleError(message, place=place, streams=self.streams, effects=self.effects)

    def _end(self, *done: Place, after: Iterable[Place] = ()) -> Event:
        for place in done:
            self.position[place.rank] += 1
        return Event(done=done, after=tuple(after))

    def _try_send(self, place: Place, message: Message) -> Event | None:
        peer = place.rank + message.to
        if not message.blocking:
            self.in_flight[place.rank, peer, message.group].append((message, place))
            return self._end(place)
        other = self.current(peer)
        if other is None:
            return None
        expected = self.effect(other).receives
        if expected is None or peer - expected.to != place.rank or expected.group != message.group:
            return None
        self._must_match(message, place, expected, other)
        return self._end(place, other)

    def _try_receive(self, place: Place, message: Message) -> Event | None:
        peer = place.rank - message.to
        if message.blocking:
            return None  # ends from the sender's side
        queue = self.in_flight[peer, place.rank, message.group]
        if not queue:
            return None
        sent, sender = queue.popleft()
        self._must_match(sent, sender, message, place)
        return self._end(place, after=[sender])

    def _try_collective(self, place: Place, collective: Collective) -> Event | None:
        count = len(self.collectives[place.rank])
        for rank, issued in enumerate(self.collectives):
            if len(issued) > count and issued[count][0] != collective.name:
                other_name, its_place = issued[count]
                raise self.error(
                    f"collective {count} over the stages is {collective.name} here, but {other_name} on rank "
                    f"{rank} (step {its_place.step}); all ranks must issue the same ones in the same order.",
                    place,
                )
        together = [place] if not collective.blocking else self._places_in_collective()
        if not collective.blocking or len(together) == len(self.streams):
            for other in together:
                its_count, its_collective = len(self.collectives[other.rank]), self.effect(other).collective
                if (its_count, its_collective) != (count, collective):
                    raise self.error(
                        f"collective {its_count} over the stages is {self._collective_name(other)} here; "
                        f"rank {place.rank} is in collective {count}, {collective.name}.",
                        other,
                    )
                self.collectives[other.rank].append((collective.name, other))
            return self._end(*together)
        return None

    def _collective_name(self, place: Place) -> str:
        collective = self.effect(place).collective
        return "none" if collective is None else collective.name

    def _places_in_collective(self) -> list[Place]:
        places = [self.current(rank) for rank in range(len(self.streams))]
        return [its for its in places if its is not None and self.effect(its).collective is not None]

    def _try_wait(self, place: Place, name: str) -> Event | None:
        count = sum(issued == name for issued, _ in self.collectives[place.rank])
        if count == 0:
            raise self.error(f"waits for {name}, which this rank has not started.", place)
        started = [[its for issued, its in rank if issued == name] for rank in self.collectives]
        if any(len(places) < count for places in started):
            return None
        return self._end(place, after=[places[count - 1] for places in started])

    def _raise_if_unpaired(self) -> None:
        """Every message must have both its ends; the rest of a fault would only show far from its cause."""
        ends: dict[tuple[Message, int, int], tuple[list[Place], list[Place]]] = defaultdict(lambda: ([], []))
        for place in (place for places in self.places for place in places):
            effect = self.effect(place)
            for side, message in enumerate((effect.sends, effect.receives)):
                if message is None:
                    continue
                peer = place.rank + (message.to if side == 0 else -message.to)
                if not 0 <= peer < len(self.streams):
                    raise self.error(f"its other end would be stage {peer} of {len(self.streams)}.", place)
                link = (place.rank, peer) if side == 0 else (peer, place.rank)
                ends[message, *link][side].append(place)
        for (message, sender, receiver), (sends, receives) in ends.items():
            if len(sends) != len(receives):
                raise self.error(
                    f"rank {sender} sends {message.name} to rank {receiver} {len(sends)} times, but rank "
                    f"{receiver} receives it {len(receives)} times.",
                    max(sends, receives, key=len)[-1],
                )

    def _must_match(self, sent: Message, sender: Place, expected: Message, receiver: Place) -> None:
        if sent != expected:
            raise self.error(
                f"gets {sent.name} of rank {sender.rank} (step {sender.step}), but expects {expected.name}.",
                receiver,
            )

    def raise_if_stuck(self) -> None:
        """Name the ranks that wait for each other, or the one that waits for a rank that has finished."""
        stuck = [rank for rank in range(len(self.streams)) if self.current(rank) is not None]
        if not stuck:
            return
        chain = [stuck[0]]
        while True:
            awaited = self._awaited(chain[-1])
            if self.current(awaited) is None or awaited in chain:
                break
            chain.append(awaited)
        cycle = chain[chain.index(awaited) :] if awaited in chain else chain
        waits = "; ".join(
            f"rank {rank} waits in {self._describe(rank)} for rank {self._awaited(rank)}" for rank in cycle
        )
        head = "deadlock" if awaited in chain else "waits for ever"
        ending = "" if awaited in chain else f"; rank {awaited} has finished"
        culprit = self.current(cycle[0] if awaited in chain else cycle[-1])
        assert culprit is not None
        raise self.error(f"{head}: {waits}{ending}.", culprit)

    def _awaited(self, rank: int) -> int:
        place = self.current(rank)
        assert place is not None
        effect = self.effect(place)
        if effect.sends is not None:
            return rank + effect.sends.to
        if effect.receives is not None:
            return rank - effect.receives.to
        if effect.waits is not None:
            counts = [sum(name == effect.waits for name, _ in issued) for issued in self.collectives]
            return next(other for other, count in enumerate(counts) if count < counts[rank])
        present = {its.rank for its in self._places_in_collective()}
        return next(other for other in range(len(self.streams)) if other not in present)

    def _describe(self, rank: int) -> str:
        place = self.current(rank)
        assert place is not None
        return f"{place.instruction(self.streams)!r} (step {place.step})"


def _places(rank: int, stream: Stream) -> Iterator[Place]:
    for step, cmds in enumerate(stream):
        for index in range(len(cmds)):
            yield Place(rank, step, index)
