"""When each rank of a pipeline computes what, from its operations in order and the time of each of them.

An operation is one of three. `Compute` takes its time on its rank and may have to wait for what other ranks computed
and sent without blocking. `Exchange` is a batch of sends and receives that the rank waits for: a message starts when
both its ends have been reached, and the rank goes on when all messages of the batch have come, as DeepSpeed's blocking
`p2p.send` and `p2p.recv` (one message), the CommitP2P of its DualPipeV and most of torch's Schedule1F1B do. `Post`
starts sends and goes on; the receiver's end is an `Exchange`. Messages between two ranks in one direction follow each
other, whoever waits for them.

    sender     Compute | Exchange(sends=[a]) . . . . |=transfer=| Compute
    receiver   Compute . . . . . . | Exchange(receives=[a]) ====| Compute

`dsaux.schedules.replay` proves dsaux's own schedules by DeepSpeed's instructions; here streams come from three engines
and every operation has a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Compute:
    """Work of one rank.

    Attributes:
        seconds: how long it takes.
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
        busy_s: how long each rank computed.
    """

    end_s: tuple[float, ...]
    busy_s: tuple[float, ...]


def replay_times(streams: Sequence[Sequence[Operation]]) -> Replayed:
    """Run the operations of all ranks.

    Args:
        streams: of rank 0, 1, ..., in order.

    Raises:
        RuntimeError: if the ranks wait for each other forever.
    """
    state = _Replay(len(streams))
    place = [0] * len(streams)
    went_on = True
    while went_on:
        went_on = False
        for rank, stream in enumerate(streams):
            while place[rank] < len(stream) and state.try_next(rank, stream[place[rank]]):
                place[rank] += 1
                went_on = True
    stuck = [rank for rank, stream in enumerate(streams) if place[rank] < len(stream)]
    if stuck:
        raise RuntimeError(f"ranks {stuck} wait for each other forever; this order of operations has a deadlock.")
    return Replayed(tuple(state.now), tuple(state.busy))


class _Replay:
    def __init__(self, num_ranks: int) -> None:
        self.now, self.busy = [0.0] * num_ranks, [0.0] * num_ranks
        self.made: dict[Hashable, float] = {}  # without blocking: when it was there for who needs it
        self.posted: dict[tuple[Hashable, int], float] = {}  # exchanges: when an end was reached
        self.came: dict[Hashable, float] = {}
        self.free_from: dict[tuple[int, int], float] = {}  # (sender, receiver): when the last message is through

    def try_next(self, rank: int, operation: Operation) -> bool:
        """Do the next operation of a rank; False if it has to wait for another rank's first."""
        if isinstance(operation, Compute):
            return self._compute(rank, operation)
        self._post(rank, operation.messages)
        return isinstance(operation, Post) or self._exchange(rank, operation)

    def _compute(self, rank: int, operation: Compute) -> bool:
        if any(name not in self.made for name in operation.needs):
            return False
        start = max([self.now[rank], *(self.made[name] for name in operation.needs)])
        self.now[rank] = start + operation.seconds
        self.busy[rank] += operation.seconds
        if operation.makes is not None:
            self.made[operation.makes] = self.now[rank]
            if operation.sends_to is not None:
                receiver, seconds = operation.sends_to
                self.made[operation.makes] = self._travel((rank, receiver), self.now[rank], seconds)
        return True

    def _post(self, rank: int, messages: Sequence[Message]) -> None:
        for message in messages:
            self.posted.setdefault((message.name, rank), self.now[rank])

    def _exchange(self, rank: int, operation: Exchange) -> bool:
        ends = [self._end_of(message) for message in operation.messages]
        if any(end is None for end in ends):
            return False
        self.now[rank] = max([self.now[rank], *(end for end in ends if end is not None)])
        return True

    def _travel(self, way: tuple[int, int], ready_s: float, seconds: float) -> float:
        """When a message has come that follows the others on its way."""
        self.free_from[way] = max(ready_s, self.free_from.get(way, 0.0)) + seconds
        return self.free_from[way]

    def _end_of(self, message: Message) -> float | None:
        """When a message has come; None while one of its ends has not been reached."""
        if message.name not in self.came:
            ends = [self.posted.get((message.name, rank)) for rank in (message.sender, message.receiver)]
            if ends[0] is None or ends[1] is None:
                return None
            way = (message.sender, message.receiver)
            self.came[message.name] = self._travel(way, max(ends[0], ends[1]), message.seconds)
        return self.came[message.name]
