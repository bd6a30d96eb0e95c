"""The schedule of greedy local losses: a wavefront over batches, the first stage first.

One message per boundary and tick goes down, from stage ``k`` to stage ``k + 1``, and has a whole tick to travel.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import PipeSchedule

from dsaux.schedules.instructions import (
    AuxOptimizerStep,
    HeadBackward,
    HeadLoss,
    LoadReplicaBatch,
    OptimizerStep,
    PipeInstruction,
    ReceivedForward,
    RecvOutput,
    ReduceAuxGrads,
    ReduceGrads,
    SendOutput,
    WaitRecvOutput,
    WaitSendOutput,
    WriteOutput,
)
from dsaux.schedules.lagrangian import wavefront_batch

LAG = -1
"""Ticks from a stage to the one before it: that one is a tick ahead."""


class LocalSchedule(PipeSchedule):  # type: ignore[misc]
    """One tick of greedy training: stage ``k`` treats batch ``tick - k``.

    Three stages and three batches, two ticks to fill and two to drain; FB is a stage's forward and backward pass, that
    of its head included::

        tick      0     1     2     3     4
        stage 0   FB0   FB1   FB2   .     .
        stage 1   .     FB0   FB1   FB2   .
        stage 2   .     .     FB0   FB1   FB2

    What stage ``k`` makes in a tick, before its own step of that batch, stage ``k + 1`` uses in the next. Inside a tick
    of stage ``k``, with M micro-batches; what only some stages do stands in brackets::

        load  [await X_k]  forward  [write X_(k+1)]  loss of the head  backward                        M times
        [post the next receive of X_k]       behind the last forward pass, when the message is used up
        [start to send X_(k+1)]              likewise
        start the sum of figures | reduce over replicas, optimizer step | wait for that sum

    A stage without a batch (``.``) gives zeros to the sum and posts the receive that it may need.

    Args:
        micro_batches: micro-batches in a batch; gradients add up over them.
        stages: number of stages K.
        stage_id: the stage k to make the instructions for.
        tick: ticks since the wavefront was empty.
        num_batches: batches of the wavefront, where the last one is known (while it drains); None while batches follow.
    """

    def __init__(
        self, micro_batches: int, stages: int, stage_id: int, *, tick: int, num_batches: int | None = None
    ) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.tick = tick
        self.num_batches = tick + 1 if num_batches is None else num_batches

    def batch(self, stage: int) -> int | None:
        """The batch that a stage treats in this tick, counted from the start of the wavefront; None if it has none."""
        return wavefront_batch(self.tick, stage, num_stages=self.stages, num_batches=self.num_batches, lag=LAG)

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield one list of instructions per micro-batch, or one for a tick without a batch."""
        batch = self.batch(self.stage_id)
        if batch is None:
            yield [*self._await_last_send(), *self._post_receive(), ReduceAuxGrads(), AuxOptimizerStep()]
            return
        for micro_batch in range(self.micro_batches):
            first, last = micro_batch == 0, micro_batch == self.micro_batches - 1
            cmds: list[PipeInstruction] = [LoadReplicaBatch(0)]
            if first and not self.is_first_stage:
                cmds.append(WaitRecvOutput())
            cmds.append(ReceivedForward(0))
            if last:
                cmds += self._post_receive()
            if not self.is_last_stage:
                cmds += [WaitSendOutput()] if first and batch > 0 else []
                cmds += [WriteOutput(0), SendOutput()] if last else [WriteOutput(0)]
            cmds += [HeadLoss(0), HeadBackward(0)]
            if last:
                cmds += [ReduceAuxGrads(), ReduceGrads(), OptimizerStep(), AuxOptimizerStep()]
            yield cmds

    def num_pipe_buffers(self) -> int:
        """One: a micro-batch is finished before the next is loaded."""
        return 1

    def _post_receive(self) -> list[PipeInstruction]:
        """The stage before sends in this tick if it has a batch."""
        sends = not self.is_first_stage and self.batch(self.stage_id - 1) is not None
        return [RecvOutput()] if sends else []

    def _await_last_send(self) -> list[PipeInstruction]:
        """In the first tick without a batch after the last one."""
        is_behind_last = self.tick - self.stage_id == self.num_batches
        return [WaitSendOutput()] if is_behind_last and not self.is_last_stage else []
