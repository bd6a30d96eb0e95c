"""The instructions of greedy local losses (`schedule: local`), as methods on the engine; between local step and engine.

Stage k takes X_k, what stage k-1 has really made of the batch, and learns from the task's loss behind a head of its own
(`dsaux.models.local_heads`), the last stage from the network's own. There is no AuxNet: of its sum only the figures are
left that all ranks want to know. The order is in `dsaux.schedules.local`, the messages are in `dsaux.transfers`.
"""

from __future__ import annotations

from deepspeed.runtime.engine import DeepSpeedEngine

from dsaux.local_step import LocalStepEngine
from dsaux.schedules import instructions


class GreedyStepEngine(LocalStepEngine):
    """What a rank does for each instruction of a greedy schedule; the others stand in `LocalStepEngine`."""

    def _exec_received_forward(self, buffer_id: int) -> None:
        """X_(k+1) = F_k(X_k)."""
        inputs = self.pipe_buffers["inputs"][buffer_id]
        stage_input = inputs.detach()
        if not self.is_first_stage():
            assert self.receiver is not None, "all stages but the first receive"
            received, _ = self.receiver.read(self._micro_batch)
            # A copy: the next receive, which is posted before the backward pass, writes over the message.
            stage_input = self._in_stage_precision(received, inputs).clone()
        if stage_input.is_floating_point():  # text is whole numbers
            stage_input.requires_grad_(self._reentrant_activation_checkpointing())
        self.pipe_buffers["stage_inputs"][buffer_id] = stage_input
        self.pipe_buffers["outputs"][buffer_id] = DeepSpeedEngine.forward(self, stage_input)

    def _exec_head_loss(self, buffer_id: int) -> None:
        """The task's loss, behind this stage's own head; the last stage makes the network's scores itself."""
        if self.is_last_stage():
            self._task_loss(buffer_id)
            return
        head = self.module.local_head
        assert head is not None, "the engine's constructor asks for heads"
        scores = head(self.pipe_buffers["outputs"][buffer_id])
        self.loss = self.module.loss_fn(scores, self.pipe_buffers["labels"][buffer_id])
        self._note_loss(self.loss)
        self.train_loss_sum += self.loss.detach() / self.micro_batches

    def _exec_head_backward(self, buffer_id: int) -> None:
        """Gradients of head and stage; DeepSpeed divides by the number of micro-batches."""
        DeepSpeedEngine.backward(self, self.loss)
        for key in ("stage_inputs", "outputs", "inputs", "labels"):
            self.pipe_buffers[key][buffer_id] = None
        if self.is_last_micro_batch:
            self._note_gradients()

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _exec_write_output(self, buffer_id: int) -> None:
        """X_(k+1) of this micro-batch, into the message to the next stage."""
        assert self.sender is not None, "all stages but the last send"
        self.sender.write(self._micro_batch, self.pipe_buffers["outputs"][buffer_id].detach())

    # DeepSpeed dispatches by exact type through unbound functions: each instruction must stand in the map. Which
    # neighbour a stage sends to is the affair of its sender and receiver alone.
    _INSTRUCTION_MAP = {
        **LocalStepEngine._INSTRUCTION_MAP,
        instructions.ReceivedForward: _exec_received_forward,
        instructions.HeadLoss: _exec_head_loss,
        instructions.HeadBackward: _exec_head_backward,
        instructions.WriteOutput: _exec_write_output,
        instructions.SendOutput: LocalStepEngine._exec_send_variable,
        instructions.WaitSendOutput: LocalStepEngine._exec_wait_send_variable,
        instructions.RecvOutput: LocalStepEngine._exec_recv_variable,
        instructions.WaitRecvOutput: LocalStepEngine._exec_wait_recv_variable,
    }
