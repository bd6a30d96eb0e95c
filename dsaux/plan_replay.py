"""When each rank of a pipeline computes what, from its operations in order and the time of each of them.

An operation is one of three. `Compute` takes its time on its rank and may have to wait for what other ranks computed
and sent without blocking. `Exchange` is a batch of sends and receives that the rank waits for: a message starts when
both its ends have been reached, and the rank goes on when all messages of the batch have come, as DeepSpeed's blocking
`p2p.send` and `p2p.recv` (one message), the CommitP2P of its DualPipeV and most of torch's Schedule1F1B do. `Post`
starts sends and goes on; the receiver's end is an `Exchange`. Messages between two ranks in one direction follow each
other, whoever waits for them.

    sender     Compute | Exchange(sends=[a]) . . . . |=transfer=| Compute
    receiver   Compute . . . . . . | Exchange(receives=[a]) ====| Compute

Ranks may share a core. Then those that compute at a time get equal parts of it, as a kernel's fair scheduler gives
them, and a rank whose neighbours wait goes faster.

`dsaux.schedules.replay` proves dsaux's own schedules by DeepSpeed's instructions; here streams come from three engines
and every operation has a time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Compute:
    """Work of one rank.

    Attributes:
        seconds: how long it takes; on a shared core, beside all ranks of it at work.
        makes: name of what it makes, for those who need it; None if nobody does.
        sends_to: the rank that gets it, and the seconds that it travels, without blocking; None: it stays on this rank.
        needs: names of what it needs, from this rank or another.
    """

    seconds: float
    makes: Hashable = None
    sends_to: tuple[int, float] | None = None
    needs: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class Message:
    """One message between two ranks; both ends name it alike.

    Attributes:
        name: what is sent.
        sender: its rank.
        receiver: its rank.
        seconds: how long it travels.
    """

    name: Hashable
    sender: int
    receiver: int
    seconds: float


@dataclass(frozen=True)
class Exchange:
    """Messages that a rank starts together and waits for.

    Attributes:
        messages: those that it sends or receives.
    """

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Post:
    """Messages whose sending a rank starts, and does not wait for.

    Attributes:
        messages: those that it sends.
    """

    messages: tuple[Message, ...]


Operation = Compute | Exchange | Post


@dataclass(frozen=True)
class Replayed:
    """What a replay gave.

    Attributes:
        end_s: when each rank has done all of its operations.
        busy_s: how long each rank computed; on a shared core its part of the time.
    """

    end_s: tuple[float, ...]
    busy_s: tuple[float, ...]


def replay_times(streams: Sequence[Sequence[Operation]], *, cores: Sequence[int] | None = None) -> Replayed:
    """Run the operations of all ranks.

    Args:
        streams: of rank 0, 1, ..., in order.
        cores: the core of each rank; None: every rank has its own.

    Raises:
        RuntimeError: if the ranks wait for each other forever.
    """
    replay = _Replay(streams, cores=range(len(streams)) if cores is None else cores)
    replay.run()
    if stuck := replay.stuck():
        raise RuntimeError(f"ranks {stuck} wait for each other forever; this order of operations has a deadlock.")
    return Replayed(tuple(replay.end_s), tuple(replay.busy_s))


@dataclass
class _Core:
    """A core and who computes on it.

    Attributes:
        residents: ranks that it has.
        left_s: of each rank that computes, what it still needs beside all residents at work.
        since_s: when these were right.
        changes: how often who computes has changed.
    """

    residents: int
    left_s: dict[int, float]
    since_s: float = 0.0
    changes: int = 0


class _Replay:
    """Events in the order of time: a rank has computed, or something is there that ranks may be waiting for."""

    def __init__(self, streams: Sequence[Sequence[Operation]], *, cores: Sequence[int]) -> None:
        self.streams = streams
        self.end_s, self.busy_s = [0.0] * len(streams), [0.0] * len(streams)
        self._now, self._place = 0.0, [0] * len(streams)
        residents = Counter(cores)
        by_number = {number: _Core(count, {}) for number, count in residents.items()}
        self._cores = [by_number[number] for number in cores]
        self._events: list[tuple[float, int, _Core | None, int, Hashable]] = []
        self._numbers = itertools.count()  # events of the same time come in the order in which they were found
        self._there_s: dict[Hashable, float] = {}  # what was made or has travelled: when
        self._waiting: defaultdict[Hashable, list[int]] = defaultdict(list)
        self._ends: defaultdict[Hashable, set[int]] = defaultdict(set)  # of a message: who has come to it
        self._free_from_s: dict[tuple[int, int], float] = {}  # (sender, receiver): when the last message is through

    def run(self) -> None:
        """Go on until nothing happens any more."""
        for rank in range(len(self.streams)):
            self._go_on(rank)
        while self._events:
            time, _, core, changes, name = heapq.heappop(self._events)
            if core is None:
                self._now = time
                for rank in self._waiting.pop(name, ()):
                    self._go_on(rank)
            elif core.changes == changes:
                self._now = time
                self._has_computed(core)

    def stuck(self) -> list[int]:
        """The ranks that have operations left."""
        return [rank for rank, stream in enumerate(self.streams) if self._place[rank] < len(stream)]

    def _go_on(self, rank: int) -> None:
        """Do what a rank can do now, up to its next computation."""
        stream = self.streams[rank]
        while self._place[rank] < len(stream):
            operation = stream[self._place[rank]]
            if isinstance(operation, Compute):
                if not self._waits(rank, operation.needs):
                    self._start(rank, operation.seconds)
                return
            for message in operation.messages:
                self._come_to(message, rank)
            if isinstance(operation, Exchange) and self._waits(rank, [m.name for m in operation.messages]):
                return
            self._place[rank] += 1
        self.end_s[rank] = self._now

    def _waits(self, rank: int, names: Sequence[Hashable]) -> bool:
        """Whether something is not there yet; the rank goes on when it is."""
        for name in names:
            if self._there_s.get(name, math.inf) > self._now:
                self._waiting[name].append(rank)
                return True
        return False

    def _start(self, rank: int, seconds: float) -> None:
        core = self._cores[rank]
        self._settle(core)
        core.left_s[rank] = seconds
        self._schedule(core)

    def _has_computed(self, core: _Core) -> None:
        """The rank with least left is through."""
        rank = min(core.left_s, key=lambda other: core.left_s[other])
        self._settle(core)
        del core.left_s[rank]
        self._schedule(core)
        operation = self.streams[rank][self._place[rank]]
        assert isinstance(operation, Compute)
        if operation.makes is not None:
            there_s = self._now
            if operation.sends_to is not None:
                receiver, seconds = operation.sends_to
                there_s = self._travel((rank, receiver), seconds)
            self._is_there(operation.makes, there_s)
        self._place[rank] += 1
        self._go_on(rank)

    def _settle(self, core: _Core) -> None:
        """Count what has been computed on a core since its ranks last changed."""
        elapsed, at_work = self._now - core.since_s, len(core.left_s)
        for rank in core.left_s:
            core.left_s[rank] = max(0.0, core.left_s[rank] - elapsed * core.residents / at_work)
            self.busy_s[rank] += elapsed / at_work
        core.since_s = self._now

    def _schedule(self, core: _Core) -> None:
        """When the next of a core's ranks will be through, if no other begins."""
        core.changes += 1
        if core.left_s:
            seconds = min(core.left_s.values()) * len(core.left_s) / core.residents
            self._push(self._now + seconds, core, core.changes, None)

    def _come_to(self, message: Message, rank: int) -> None:
        """A rank has come to its end of a message, which travels when both have."""
        ends = self._ends[message.name]
        if rank in ends:
            return
        ends.add(rank)
        if {message.sender, message.receiver} <= ends:
            self._is_there(message.name, self._travel((message.sender, message.receiver), message.seconds))

    def _travel(self, way: tuple[int, int], seconds: float) -> float:
        """When a message has come that follows the others on its way."""
        self._free_from_s[way] = max(self._now, self._free_from_s.get(way, 0.0)) + seconds
        return self._free_from_s[way]

    def _is_there(self, name: Hashable, time_s: float) -> None:
        self._there_s[name] = time_s
        self._push(time_s, None, 0, name)

    def _push(self, time_s: float, core: _Core | None, changes: int, name: Hashable) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), core, changes, name))
