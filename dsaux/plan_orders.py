"""In which order the ranks of an exact pipeline compute and send: the engines' own orders, as operations with times.

The orders are asked of the engines: DeepSpeed's `TrainSchedule` and `DualPipeVSchedule`, and what
`torch.distributed.pipelining` computes for its schedules. `dsaux.plan_replay` runs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from dsaux.plan_replay import Compute, Exchange, Message, Operation, Post
from dsaux.plan_workload import BackwardSplit

FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD = "F", "B", "I", "W"


@dataclass(frozen=True)
class ChunkCost:
    """A piece of the network between two cuts, for a micro-batch.

    Attributes:
        forward_s: seconds of its forward pass.
        backward_s: seconds of its backward pass.
        transfer_s: seconds that its output, or the gradient of it, travels to another rank.
        split: what taking its backward pass apart costs.
    """

    forward_s: float
    backward_s: float
    transfer_s: float = 0.0
    split: BackwardSplit = field(default_factory=BackwardSplit)

    def seconds(self, kind: str) -> float:
        """Time of one pass."""
        shares = {BACKWARD: 1.0, INPUT_GRAD: self.split.input_share, WEIGHT_GRAD: self.split.weight_share}
        return self.forward_s if kind == FORWARD else shares[kind] * self.backward_s


@dataclass(frozen=True)
class Pass:
    """One pass of a chunk over a micro-batch.

    Attributes:
        kind: FORWARD, BACKWARD, or its parts INPUT_GRAD and WEIGHT_GRAD.
        chunk: which piece of the network.
        micro_batch: which micro-batch.
    """

    kind: str
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Order:
    """All ranks of one replica.

    Attributes:
        passes: of each rank, in order.
        operations: the same with messages, ready to be replayed.
    """

    passes: tuple[tuple[Pass, ...], ...]
    operations: tuple[tuple[Operation, ...], ...]


def rank_of_chunk(order: str, chunk: int, *, stages: int) -> int:
    """The rank that holds a chunk: round for interleaved, there and back for the V shapes."""
    if order in _V_SHAPED:
        return min(chunk, 2 * stages - 1 - chunk)
    return chunk % stages


def order_of(name: str, *, chunks: Sequence[ChunkCost], stages: int, micro_batches: int) -> Order:
    """The order of a contestant.

    Args:
        name: a key of `ORDERS`.
        chunks: one a rank, or two for the schedules that need two.
        stages: number of ranks K.
        micro_batches: in a step.

    Raises:
        ValueError: if the engine refuses so few, or this number of, micro-batches.
    """
    if name in _DEEPSPEED:
        return _deepspeed_order(name, chunks=chunks, stages=stages, micro_batches=micro_batches)
    passes = tuple(tuple(_TORCH[name](rank, stages, micro_batches)) for rank in range(stages))
    if name == "torch-1f1b":
        return Order(passes, tuple(tuple(_fused(own, chunks=chunks)) for own in passes))
    operations = tuple(tuple(_awaiting(name, step, chunks=chunks, stages=stages) for step in own) for own in passes)
    return Order(passes, operations)


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------


def _deepspeed_order(name: str, *, chunks: Sequence[ChunkCost], stages: int, micro_batches: int) -> Order:
    from deepspeed.runtime.pipe import schedule

    kinds = {schedule.ForwardPass: FORWARD, schedule.BackwardPass: BACKWARD}
    # instruction -> whether it is a gradient, and whether this rank sends it
    ends = {
        schedule.SendActivation: (False, True),
        schedule.RecvActivation: (False, False),
        schedule.SendGrad: (True, True),
        schedule.RecvGrad: (True, False),
    }
    passes, operations = [], []
    for rank in range(stages):
        counts: Counter[tuple[str, int]] = Counter()
        own: list[Pass] = []
        stream: list[Operation] = []
        queued: list[Message] = []
        made = _DEEPSPEED[name](micro_batches=micro_batches, stages=stages, stage_id=rank)
        for command in (command for commands in made for command in commands):
            kind, phase = type(command), int(getattr(command, "phase", 0))
            chunk = rank if phase == 0 else 2 * stages - 1 - rank
            number = counts[kind.__name__, phase]
            counts[kind.__name__, phase] += 1
            if kind in kinds:
                own.append(Pass(kinds[kind], chunk, number))
                stream.append(Compute(chunks[chunk].seconds(kinds[kind])))
            elif kind in ends:
                # a chunk gets activations from the one before it and gradients from the one behind it
                is_gradient, is_sent = ends[kind]
                maker = chunk - 1 if is_gradient == is_sent else chunk
                between = [rank_of_chunk(name, piece, stages=stages) for piece in (maker, maker + 1)]
                sender, receiver = reversed(between) if is_gradient else between
                message = Message((is_gradient, maker, number), sender, receiver, chunks[maker].transfer_s)
                if name == "deepspeed-1f1b":
                    stream.append(Exchange((message,)))
                else:
                    queued.append(message)
            elif kind.__name__ == "CommitP2P" and queued:
                stream.append(Exchange(tuple(queued)))
                queued = []
        passes.append(tuple(own))
        operations.append(tuple(stream))
    return Order(tuple(passes), tuple(operations))


def _train_schedule(**shape: int) -> Any:
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    return TrainSchedule(**shape)


def _dual_pipe_v(**shape: int) -> Any:
    from deepspeed.runtime.pipe.schedule import DualPipeVSchedule

    return DualPipeVSchedule(**shape)


# ---- torch.distributed.pipelining -----------------------------------------------------------------------------------


def _fused(passes: Sequence[Pass], *, chunks: Sequence[ChunkCost]) -> Iterator[Operation]:
    """Schedule1F1B's operations of a rank: what it sends behind a pass is waited for with the next pass's receive.

    Only while the pipeline fills and empties does a rank send and go on::

        fill     receive | F | post the send
        steady   exchange (send of the pass before, receive) | B or F
        empty    receive | B | post the send
    """
    rank = passes[0].chunk
    before: Pass | None = None
    for own in passes:
        together = [_received(own, chunks=chunks)]
        if before is not None:
            sent = _sent(before, chunks=chunks)
            if before.kind != own.kind:
                together.append(sent)
            elif sent is not None:
                yield Post((sent,))
        if messages := tuple(message for message in together if message is not None):
            yield Exchange(messages)
        yield Compute(chunks[rank].seconds(own.kind))
        before = own
    final = _sent(passes[-1], chunks=chunks)
    if final is not None:
        yield Exchange((final,))


def _sent(own: Pass, *, chunks: Sequence[ChunkCost]) -> Message | None:
    """What a pass hands to the next stage or the one before; None at the ends of the pipeline."""
    target = own.chunk - 1 if own.kind == BACKWARD else own.chunk + 1
    if not 0 <= target < len(chunks):
        return None
    name = (own.kind, own.chunk, own.micro_batch)
    return Message(name, own.chunk, target, chunks[min(own.chunk, target)].transfer_s)


def _received(own: Pass, *, chunks: Sequence[ChunkCost]) -> Message | None:
    """What a pass needs from the stage before or the next one; None at the ends of the pipeline."""
    source = own.chunk + 1 if own.kind == BACKWARD else own.chunk - 1
    if not 0 <= source < len(chunks):
        return None
    return _sent(Pass(own.kind, source, own.micro_batch), chunks=chunks)


def _awaiting(name: str, step: Pass, *, chunks: Sequence[ChunkCost], stages: int) -> Compute:
    """A pass of torch's runtime for several chunks: it waits for its input, and sends do not block there."""
    rank, last = rank_of_chunk(name, step.chunk, stages=stages), len(chunks) - 1
    goes_back = step.kind in (BACKWARD, INPUT_GRAD)
    needs: tuple[Hashable, ...] = ()
    if step.kind == FORWARD and step.chunk > 0:
        needs = ((FORWARD, step.chunk - 1, step.micro_batch),)
    if goes_back and step.chunk < last:
        needs = ((BACKWARD, step.chunk + 1, step.micro_batch),)
    makes: Hashable = None
    sends_to: tuple[int, float] | None = None
    if step.kind != WEIGHT_GRAD:
        makes = (BACKWARD if goes_back else FORWARD, step.chunk, step.micro_batch)
        target = step.chunk - 1 if goes_back else step.chunk + 1
        receiver = rank_of_chunk(name, target, stages=stages) if 0 <= target <= last else rank
        if receiver != rank:
            sends_to = receiver, chunks[min(step.chunk, target)].transfer_s
    return Compute(chunks[step.chunk].seconds(step.kind), makes=makes, sends_to=sends_to, needs=needs)


def _torch_1f1b(rank: int, stages: int, micro_batches: int) -> Iterator[Pass]:
    """Schedule1F1B: K - k forward passes first, then a backward and a forward pass in turn."""
    if micro_batches < stages:
        raise ValueError(f"Schedule1F1B needs {stages} micro-batches for {stages} stages, not {micro_batches}")
    ahead = min(micro_batches, stages - rank)
    for number in range(ahead):
        yield Pass(FORWARD, rank, number)
    for number in range(micro_batches):
        yield Pass(BACKWARD, rank, number)
        if number + ahead < micro_batches:
            yield Pass(FORWARD, rank, number + ahead)


def _torch_interleaved(rank: int, stages: int, micro_batches: int) -> Iterator[Pass]:
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

    rounds = max(1, micro_batches // stages)
    if micro_batches % rounds:
        raise ValueError(f"ScheduleInterleaved1F1B has {rounds} rounds, which must divide {micro_batches}")
    shape = SimpleNamespace(
        pp_group_size=stages,
        n_local_stages=2,
        _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // rounds,
    )
    return _passes(ScheduleInterleaved1F1B._calculate_single_rank_operations(shape, rank))  # type: ignore[arg-type]


def _torch_zbv(rank: int, stages: int, micro_batches: int) -> Iterator[Pass]:
    from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

    shape = SimpleNamespace(pp_group_size=stages, num_stages=2 * stages, _n_microbatches=micro_batches)
    return _passes(ScheduleZBVZeroBubble._calculate_single_rank_operations(shape, rank))  # type: ignore[arg-type]


def _passes(actions: Sequence[Any]) -> Iterator[Pass]:
    """Their actions without the empty slots, which torch's runtime skips as well."""
    for action in actions:
        if action is not None:
            yield Pass(action.computation_type.value, action.stage_index, action.microbatch_index)


_DEEPSPEED: Mapping[str, Callable[..., Any]] = {
    "deepspeed-1f1b": _train_schedule,
    "deepspeed-dualpipev": _dual_pipe_v,
}
_TORCH: Mapping[str, Callable[[int, int, int], Iterator[Pass]]] = {
    "torch-1f1b": _torch_1f1b,
    "torch-interleaved": _torch_interleaved,
    "torch-zbv": _torch_zbv,
}
_V_SHAPED = ("deepspeed-dualpipev", "torch-zbv")
TAKEN_APART = ("torch-zbv",)
"""Those that take backward passes apart."""
ORDERS: Mapping[str, int] = {
    "deepspeed-1f1b": 1,
    "deepspeed-dualpipev": 2,
    "torch-1f1b": 1,
    "torch-interleaved": 2,
    "torch-zbv": 2,
}
"""Contestant -> pieces of the network on a rank."""
