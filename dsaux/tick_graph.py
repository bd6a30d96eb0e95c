"""One form of a tick as graphs: how it is captured and how it is replayed. Used by `dsaux.stage_graph`.

What the graphs read and write has a fixed place:

    batch, received variables         copied into static tensors before the graphs that read them
    gradients of the stage            the graphs' own tensors; every replay writes them anew, none is added to
    AuxNet's gradients and figures    a message of the graphs' own, copied into the one that is summed
    refreshed variables, outputs      the graphs' own tensors, copied into the message to the neighbour
    loss sums, hits, faults           the engine's tensors, which grow within the graphs
    counts of samples                 numbers on the host: the same in every tick, added in each
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from dsaux.aux_replica import Message
from dsaux.graph_capture import Capture, Recording
from dsaux.schedules import instructions as ins

if TYPE_CHECKING:
    from dsaux.local_step import LocalStepEngine

CAPTURED = (
    ins.AuxForward,
    ins.LocalForward,
    ins.ReceivedForward,
    ins.PenaltyLoss,
    ins.LagrangianLoss,
    ins.HeadLoss,
    ins.LocalBackward,
    ins.HeadBackward,
    ins.RefreshVariable,
    ins.WriteOutput,
    ins.AuxBackward,
)
"""Instructions without communication, which a graph may hold."""
_AWAITS = (ins.WaitRecvVariable, ins.WaitRecvOutput)
_SENDS = (ins.SendVariable, ins.SendOutput)

Batch = tuple[Tensor, Tensor]


class _Inbox:
    """Stands in for the receiver: the same tensors in every tick."""

    def __init__(self, variables: list[Batch]) -> None:
        self._variables = variables

    def read(self, micro_batch: int) -> Batch:
        return self._variables[micro_batch]


class _Outbox:
    """Stands in for the sender: keeps what a graph has made, for the message."""

    def __init__(self) -> None:
        self.variables: dict[int, tuple[Tensor, Tensor | float]] = {}

    def write(self, micro_batch: int, variable: Tensor, *, scale: Tensor | float = 1.0) -> None:
        self.variables[micro_batch] = (variable.detach(), scale)


@dataclass(frozen=True)
class TickGraph:
    """The recordings of one form of a tick, and everything that they read and write.

    Attributes:
        recordings: by the place, among the captured instructions of a tick, of the first one that they hold.
        size: number of captured instructions in a tick.
        batches: static inputs and labels of each micro-batch.
        received: static variable and scale of each micro-batch; empty where nothing is received.
        sent: variable and scale of each micro-batch for the neighbour; empty where nothing is sent.
        message: the AuxNet's gradients and figures.
        gradients: the stage's parameters and their static gradients, None for one that gets none.
        has_gradients: the flags of DeepSpeed's bf16 optimizer; None with another one.
        samples: labels that a tick counts.
        loss: of the last micro-batch.
    """

    recordings: dict[int, Recording]
    size: int
    batches: list[Batch]
    received: list[Batch]
    sent: dict[int, tuple[Tensor, Tensor | float]]
    message: Message
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    has_gradients: list[list[bool]] | None
    samples: int
    loss: Tensor

    def replay(self, engine: LocalStepEngine, instructions: Sequence[Any], batches: Sequence[Batch]) -> None:
        """Run a tick: replay what was captured, and run the other instructions in their turn.

        Args:
            engine: the one that it was captured from.
            instructions: of the tick; cut nowhere but where the recordings are.
            batches: the micro-batches of the tick.
        """
        for static, loaded in zip(self.batches, batches, strict=True):
            _copy_pair(loaded, static)
        place = 0
        for instruction in instructions:
            if isinstance(instruction, ins.LoadReplicaBatch):
                continue
            if isinstance(instruction, CAPTURED):
                if place in self.recordings:
                    self.recordings[place].replay()
                place += 1
                if place == self.size:
                    self._hand_over(engine)
                continue
            if isinstance(instruction, _SENDS):
                assert engine.sender is not None, "where a schedule sends there is a sender"
                for micro_batch, (variable, scale) in self.sent.items():
                    engine.sender.write(micro_batch, variable, scale=scale)
            execute(engine, instruction)
            if isinstance(instruction, _AWAITS):
                assert engine.receiver is not None, "where a schedule receives there is a receiver"
                for micro_batch, static in enumerate(self.received):
                    _copy_pair(engine.receiver.read(micro_batch), static)

    def _hand_over(self, engine: LocalStepEngine) -> None:
        """Behind the last captured instruction: what sums and steps look for is where an eager tick puts it."""
        engine.aux.take(self.message)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        if self.has_gradients is not None:
            engine.optimizer.fp32_groups_has_gradients = [list(flags) for flags in self.has_gradients]
        engine.train_samples += self.samples
        engine.loss = self.loss


def record_tick(
    engine: LocalStepEngine,
    capture: Capture,
    instructions: Sequence[Any],
    batches: Sequence[Batch],
    *,
    cuts: set[int],
) -> TickGraph:
    """Capture a tick. Nothing is computed, and the engine is left as it was.

    Args:
        engine: at the start of a tick; something has been received before, where it receives.
        capture: makes the recordings.
        instructions: of the tick.
        batches: micro-batches with the shapes, layouts and precisions of the tick.
        cuts: places, among the captured instructions, at which a recording begins.
    """
    static = [(torch.zeros_like(inputs), torch.zeros_like(labels)) for inputs, labels in batches]
    received: list[Batch] = []
    if engine.receiver is not None:
        found = (engine.receiver.read(micro_batch) for micro_batch in range(len(batches)))
        received = [(torch.zeros_like(variable), torch.zeros_like(scale)) for variable, scale in found]
    outbox, message, samples = _Outbox(), engine.aux.new_message(), engine.train_samples
    with _standing_in(engine, _Inbox(received), outbox), engine.aux.filling(message):
        recordings: dict[int, Recording] = {}
        for start, work in _pieces(engine, instructions, static, cuts=cuts).items():
            clear = [message.data.zero_] if start == 0 else []
            recordings[start] = capture.record(partial(_run_all, [*clear, *work]))
        return TickGraph(
            recordings=recordings,
            size=sum(isinstance(instruction, CAPTURED) for instruction in instructions),
            batches=static,
            received=received,
            sent=outbox.variables,
            message=message,
            gradients=[(parameter, parameter.grad) for parameter in engine.module.parameters()],
            has_gradients=_bf16_flags(engine),
            samples=engine.train_samples - samples,
            loss=engine.loss.detach(),
        )


def cuts_of(instructions: Sequence[Any]) -> Iterator[int]:
    """Places, among the captured instructions, before which another one stands: there a recording begins.

    None begins with `WriteOutput`, which runs no kernel but names a tensor that the next message takes: alone it would
    be an empty graph. It belongs to the recording that makes the tensor.
    """
    place, is_cut = 0, True
    for instruction in instructions:
        if not isinstance(instruction, CAPTURED):
            is_cut = True
            continue
        if is_cut and not isinstance(instruction, ins.WriteOutput):
            yield place
            is_cut = False
        place += 1


def execute(engine: LocalStepEngine, instruction: Any) -> None:
    """Run one instruction as DeepSpeed's `_exec_schedule` does."""
    MethodType(engine._INSTRUCTION_MAP[type(instruction)], engine)(**instruction.kwargs)


def _pieces(
    engine: LocalStepEngine, instructions: Sequence[Any], batches: Sequence[Batch], *, cuts: set[int]
) -> dict[int, list[Callable[[], Any]]]:
    """The captured instructions between two cuts, by the place of the first; each micro-batch begins with its batch."""
    pieces: dict[int, list[Callable[[], Any]]] = {}
    work: list[Callable[[], Any]] = []
    ready: list[Callable[[], Any]] = []
    place, left = 0, iter(batches)
    for instruction in instructions:
        if isinstance(instruction, ins.LoadReplicaBatch):
            ready.append(partial(engine.begin_micro_batch, instruction.buffer_id, *next(left)))
        elif isinstance(instruction, CAPTURED):
            if place in cuts:
                work = pieces[place] = []
            work += [*ready, partial(execute, engine, instruction)]
            ready.clear()
            place += 1
    return pieces


@contextmanager
def _standing_in(engine: LocalStepEngine, inbox: Any, outbox: Any) -> Iterator[None]:
    """Within the block instructions read and write static tensors; behind it the engine is as it was before."""
    parameters = list(engine.module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    ends, counts = (engine.receiver, engine.sender), (engine._micro_batch, engine.train_samples)
    flags = _bf16_flags(engine)
    engine.loss = None  # its nodes of autograd belong to the stream of an eager tick
    for parameter in parameters:
        parameter.grad = None  # the first gradient of a capture is then a tensor of the capture
    engine.receiver, engine.sender = inbox, outbox
    try:
        yield
    finally:
        engine.receiver, engine.sender = ends
        engine._micro_batch, engine.train_samples = counts
        engine.loss = None
        if flags is not None:
            engine.optimizer.fp32_groups_has_gradients = flags
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for key in ("variables", "stage_inputs", "sources", "outputs", "inputs", "labels"):
            engine.pipe_buffers[key][:] = [None] * len(engine.pipe_buffers[key])


def _bf16_flags(engine: LocalStepEngine) -> list[list[bool]] | None:
    """Which parameters have a float32 gradient, as DeepSpeed's bf16 optimizer notes in the backward pass."""
    if not isinstance(engine.optimizer, BF16_Optimizer):
        return None
    return [list(flags) for flags in engine.optimizer.fp32_groups_has_gradients]


def _copy_pair(source: Batch, target: Batch) -> None:
    with torch.no_grad():
        for one, other in zip(source, target, strict=True):
            other.copy_(one, non_blocking=True)


def _run_all(work: Sequence[Callable[[], Any]]) -> None:
    for run in work:
        run()
