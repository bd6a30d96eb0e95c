"""The penalty schedule: all stages work on a batch at once; only the AuxNet's gradients cross the network."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import PipeSchedule

from dsaux.schedules.instructions import (
    AuxBackward,
    AuxForward,
    AuxOptimizerStep,
    LoadReplicaBatch,
    LocalBackward,
    LocalForward,
    OptimizerStep,
    PenaltyLoss,
    PipeInstruction,
    ReduceAuxGrads,
    ReduceGrads,
)


class PenaltySchedule(PipeSchedule):  # type: ignore[misc]
    """One batch of penalty training, the same instructions on every stage.

    Three stages and four batches; FB is a stage's AuxNet pass and its own forward and backward pass::

        tick      0     1     2     3
        stage 0   FB0   FB1   FB2   FB3
        stage 1   FB0   FB1   FB2   FB3
        stage 2   FB0   FB1   FB2   FB3

    Inside a tick, with M micro-batches; the sum runs under the stage's own optimizer step::

        load  aux-forward  forward  loss  backward  aux-backward         M times, on buffer 0
        start aux sum | reduce over replicas, optimizer step | wait for aux sum, aux step

    There is nothing to send: a stage's input and its target both come from its own replica of the AuxNet.
    With one stage there is no boundary and the AuxNet's instructions do nothing.

    Args:
        micro_batches: micro-batches in a batch; gradients add up over them.
        stages: number of stages.
        stage_id: the stage to make the instructions for.
    """

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield one list of instructions per micro-batch."""
        for micro_batch in range(self.micro_batches):
            cmds: list[PipeInstruction] = [
                LoadReplicaBatch(0),
                AuxForward(0),
                LocalForward(0),
                PenaltyLoss(0),
                LocalBackward(0),
                AuxBackward(0),
            ]
            if micro_batch == self.micro_batches - 1:
                cmds += [ReduceAuxGrads(), ReduceGrads(), OptimizerStep(), AuxOptimizerStep()]
            yield cmds

    def num_pipe_buffers(self) -> int:
        """One: a micro-batch is finished before the next is loaded."""
        return 1
