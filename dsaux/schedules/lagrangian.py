"""The augmented Lagrangian schedule: a wavefront over batches, the last stage first.

One message per boundary and tick goes up, from stage ``k`` to stage ``k - 1``, and has a whole tick to travel.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import PipeSchedule

from dsaux.schedules.instructions import (
    AuxBackward,
    AuxForward,
    AuxOptimizerStep,
    LagrangianLoss,
    LoadReplicaBatch,
    LocalBackward,
    LocalForward,
    OptimizerStep,
    PipeInstruction,
    RecvVariable,
    ReduceAuxGrads,
    ReduceGrads,
    RefreshVariable,
    SendVariable,
    WaitRecvVariable,
    WaitSendVariable,
)


class LagrangianSchedule(PipeSchedule):  # type: ignore[misc]
    """One tick of augmented Lagrangian training: stage ``k`` treats batch ``tick - (K - 1 - k)``.

    Three stages and five batches, two ticks to fill and two to drain; FB is a stage's AuxNet pass and its own forward
    and backward pass::

        tick      0     1     2     3     4     5     6
        stage 0   .     .     FB0   FB1   FB2   FB3   FB4
        stage 1   .     FB0   FB1   FB2   FB3   FB4   .
        stage 2   FB0   FB1   FB2   FB3   FB4   .     .

    What stage ``k`` refreshes in a tick, stage ``k - 1`` uses in the next. Inside a tick of stage ``k``, with M
    micro-batches; what only some stages do stands in brackets::

        load  aux-forward  forward  [await lambda'_(k+1)]  loss  backward  [refresh lambda'_k]  aux-backward   M times
        [post the next receive of lambda'_(k+1)]      behind the last loss, when the one received is used up
        [start to send lambda'_k]                     behind the last backward, before the AuxNet's
        start aux sum | reduce over replicas, optimizer step | wait for aux sum, aux step

    A stage without a batch (``.``) gives zeros to the AuxNet's sum and posts the receive that it may need. With
    `overlap` the sum of a tick is awaited in the next one, behind that tick's own work, the optimizer step included:
    the AuxNet's step comes one tick late, and no stage waits for the slowest one in the same tick. Stages may then be
    a tick apart, so that a message has less time to travel. The first and the last tick do not overlap.

    Args:
        micro_batches: micro-batches in a batch; gradients add up over them.
        stages: number of stages K.
        stage_id: the stage k to make the instructions for.
        tick: ticks since the wavefront was empty.
        num_batches: batches of the wavefront, where the last one is known (while it drains); None while batches follow.
        overlap: whether the AuxNet's sum runs under the next tick.
    """

    def __init__(
        self,
        micro_batches: int,
        stages: int,
        stage_id: int,
        *,
        tick: int,
        num_batches: int | None = None,
        overlap: bool = False,
    ) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.tick, self.overlap = tick, overlap and stages > 1
        self.num_batches = tick + 1 if num_batches is None else num_batches
        self.is_last_tick = num_batches is not None and tick == num_batches + stages - 2

    def batch(self, stage: int) -> int | None:
        """The batch that a stage treats in this tick, counted from the start of the wavefront; None if it has none."""
        return wavefront_batch(self.tick, stage, num_stages=self.stages, num_batches=self.num_batches)

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield one list of instructions per micro-batch, or one for a tick without a batch."""
        batch = self.batch(self.stage_id)
        if batch is None:
            yield [*self._await_last_send(), *self._post_receive(), *self._sum(has_batch=False)]
            return
        for micro_batch in range(self.micro_batches):
            first, last = micro_batch == 0, micro_batch == self.micro_batches - 1
            cmds: list[PipeInstruction] = [LoadReplicaBatch(0), AuxForward(0), LocalForward(0)]
            if first and not self.is_last_stage:
                cmds.append(WaitRecvVariable())
            cmds.append(LagrangianLoss(0))
            if last:
                cmds += self._post_receive()
            cmds.append(LocalBackward(0))
            if not self.is_first_stage:
                cmds += [WaitSendVariable()] if first and batch > 0 else []
                cmds += [RefreshVariable(0), SendVariable()] if last else [RefreshVariable(0)]
            cmds.append(AuxBackward(0))
            if last:
                cmds += self._sum(has_batch=True)
            yield cmds

    def num_pipe_buffers(self) -> int:
        """One: a micro-batch is finished before the next is loaded."""
        return 1

    def _post_receive(self) -> list[PipeInstruction]:
        """The stage above sends in this tick if it has a batch."""
        sends = not self.is_last_stage and self.batch(self.stage_id + 1) is not None
        return [RecvVariable()] if sends else []

    def _await_last_send(self) -> list[PipeInstruction]:
        """In the first tick without a batch after the last one."""
        is_behind_last = self.tick - (self.stages - 1 - self.stage_id) == self.num_batches
        return [WaitSendVariable()] if is_behind_last and not self.is_first_stage else []

    def _sum(self, *, has_batch: bool) -> list[PipeInstruction]:
        own: list[PipeInstruction] = [ReduceGrads(), OptimizerStep()] if has_batch else []
        if not self.overlap:
            return [ReduceAuxGrads(), *own, AuxOptimizerStep()]
        before: list[PipeInstruction] = [AuxOptimizerStep()] if self.tick > 1 else []
        flush: list[PipeInstruction] = [AuxOptimizerStep()] if self.tick == 0 or self.is_last_tick else []
        return [*own, *before, ReduceAuxGrads(), *flush]


def wavefront_batch(tick: int, stage: int, *, num_stages: int, num_batches: int, lag: int = 1) -> int | None:
    """The batch that a stage treats in a tick of the wavefront; None while it fills or drains.

    Args:
        tick: ticks since the wavefront was empty.
        stage: the stage k.
        num_stages: number of stages K.
        num_batches: batches that have entered the wavefront.
        lag: ticks from a stage to the one before it; below 0 the first stage leads, else the last.
    """
    behind = -stage if lag < 0 else num_stages - 1 - stage
    batch = tick - lag * behind
    return batch if 0 <= batch < num_batches else None
