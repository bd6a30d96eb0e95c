"""Replays the instruction streams of all ranks together: who can go on when, and who waits for whom.

Each rank runs its stream in order, as DeepSpeed's `_exec_schedule` does. A blocking send and its receive end
together, at the time the later of the two is reached. One that does not block is started and awaited, on either side
by two instructions; both waits end when the other side has started too, and one message may be under way::

    sender     start ....... wait |            the sender waits here until the receive is posted
    receiver         post ........ wait |      the receiver until the send is started

`check` looks at what the instructions do, `timeline` at how long they take.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from dsaux.schedules.effects import EFFECTS, Collective, Effect, Message
from dsaux.schedules.fault import EffectTable, Place, ScheduleError, Stream
from dsaux.schedules.instructions import PipeInstruction


@dataclass(frozen=True)
class Ticks:
    """All ranks' instructions over several ticks, one schedule after the other.

    Attributes:
        streams: instructions of rank 0, 1, ...; a tick has as many steps on each of them as on the longest.
        starts: first step of each tick.
        num_steps: steps of all ticks.
    """

    streams: tuple[Stream, ...]
    starts: tuple[int, ...]
    num_steps: int

    def tick(self, place: Place) -> int:
        """The tick that an instruction belongs to."""
        return bisect_right(self.starts, place.step) - 1


def join_ticks(schedules: Sequence[Sequence[Iterable[Sequence[PipeInstruction]]]]) -> Ticks:
    """Lay each rank's schedules one behind the other.

    Args:
        schedules: per rank the schedules it runs, one a tick. A rank with fewer steps in a tick gets empty ones, so
            that a tick starts at the same step on all ranks.
    """
    streams: list[list[Sequence[PipeInstruction]]] = [[] for _ in schedules]
    starts: list[int] = []
    for tick in zip_longest(*schedules, fillvalue=()):
        starts.append(len(streams[0]))
        steps = [[list(cmds) for cmds in schedule] for schedule in tick]
        length = max(1, *(len(its) for its in steps))
        for stream, its in zip(streams, steps, strict=True):
            stream.extend([*its, *([] for _ in range(length - len(its)))])
    return Ticks(streams=tuple(streams), starts=tuple(starts), num_steps=len(streams[0]))


@dataclass(frozen=True)
class Event:
    """Instructions that end together, and those that had to end before.

    Attributes:
        done: the instructions; a blocking send stands before its receive.
        after: where a sum was started on each rank, or the send and the receive of a message that is awaited.
    """

    done: tuple[Place, ...]
    after: tuple[Place, ...] = ()


@dataclass
class _End:
    """One end of a link between two ranks, of messages that do not block: what it started and awaited so far."""

    started: list[tuple[Message, Place]] = field(default_factory=list)
    num_awaited: int = 0


@dataclass
class _Link:
    """Messages of a group from one rank to another."""

    sends: _End = field(default_factory=_End)
    receives: _End = field(default_factory=_End)


def replay(streams: Sequence[Stream], *, effects: EffectTable = EFFECTS) -> Iterator[Event]:
    """Run all streams to their end.

    Args:
        streams: instructions of rank 0, 1, ...
        effects: what the instructions do.

    Yields:
        Events in an order in which they can happen; events of one rank are in the order of its stream.

    Raises:
        ScheduleError: on a deadlock, a message that its receiver does not expect, two messages under way on one link,
            a transfer that is not awaited once, or collectives that differ.
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
    state.raise_if_under_way()


class _Replay:
    """Where every rank stands, and what is under way between them."""

    def __init__(self, streams: Sequence[Stream], effects: EffectTable) -> None:
        self.streams, self.effects = streams, effects
        self.places = [list(_places(rank, stream)) for rank, stream in enumerate(streams)]
        self.position = [0] * len(streams)
        self.links: dict[tuple[int, int, str], _Link] = defaultdict(_Link)
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
            return self._try_send(place, effect.sends) if effect.sends.blocking else self._start(place)
        if effect.receives is not None:
            # A blocking one ends from the sender's side.
            return None if effect.receives.blocking else self._start(place)
        if effect.awaits_send is not None or effect.awaits_receive is not None:
            return self._try_await(place)
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
        other = self.current(peer)
        if other is None:
            return None
        expected = self.effect(other).receives
        if expected is None or peer - expected.to != place.rank or expected.group != message.group:
            return None
        self._must_match(message, place, expected, other)
        return self._end(place, other)

    def _start(self, place: Place) -> Event:
        """Start a send or post a receive; what went before on this end must have been awaited."""
        message, mine, link = self._link(place)
        if len(mine.started) > mine.num_awaited:
            before = mine.started[-1][1]
            raise self.error(
                f"starts a transfer of {message.name}, while that of step {before.step} "
                f"({before.instruction(self.streams)!r}) has not been awaited; one may be under way.",
                place,
            )
        mine.started.append((message, place))
        number = len(mine.started) - 1
        if all(len(end.started) > number for end in (link.sends, link.receives)):
            self._must_match(*link.sends.started[number], *link.receives.started[number])
        return self._end(place)

    def _try_await(self, place: Place) -> Event | None:
        """End a send that has left, or a receive whose message was sent."""
        message, mine, link = self._link(place)
        number = mine.num_awaited
        if len(mine.started) <= number:
            raise self.error(f"awaits a transfer of {message.name}, but none is under way on this rank.", place)
        if any(len(end.started) <= number for end in (link.sends, link.receives)):
            return None
        mine.num_awaited += 1
        return self._end(place, after=[end.started[number][1] for end in (link.sends, link.receives)])

    def _link(self, place: Place) -> tuple[Message, _End, _Link]:
        """The message of a transfer that does not block, the end of its link on this rank, and the link."""
        effect = self.effect(place)
        sent = effect.sends or effect.awaits_send
        message = sent or effect.receives or effect.awaits_receive
        assert message is not None
        peer = self._peer(place.rank, effect)
        link = self.links[(place.rank, peer, message.group) if sent else (peer, place.rank, message.group)]
        return message, link.sends if sent else link.receives, link

    def _peer(self, rank: int, effect: Effect) -> int:
        """The rank at the other end of a message."""
        sent, received = effect.sends or effect.awaits_send, effect.receives or effect.awaits_receive
        if sent is not None:
            return rank + sent.to
        assert received is not None
        return rank - received.to

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
                peer = self._peer(place.rank, effect)
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

    def raise_if_under_way(self) -> None:
        """Name a transfer that was started and is not awaited by the end of the streams."""
        for link in self.links.values():
            for end in (link.sends, link.receives):
                if len(end.started) > end.num_awaited:
                    message, place = end.started[end.num_awaited]
                    raise self.error(f"starts a transfer of {message.name}, which is never awaited.", place)

    def _awaited(self, rank: int) -> int:
        place = self.current(rank)
        assert place is not None
        effect = self.effect(place)
        if effect.sends or effect.receives or effect.awaits_send or effect.awaits_receive:
            return self._peer(rank, effect)
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
