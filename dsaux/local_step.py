"""The instructions of a local step, as methods on DeepSpeed's `PipelineEngine`. Base of the engine.

Stage k of K takes lambda_k and makes X_(k+1). The schedules (`dsaux.schedules`) say in which order these run, the
formulas are in `dsaux.objective`, the AuxNet's side in `dsaux.aux_replica`, the messages in `dsaux.transfers`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from dsaux import objective
from dsaux.aux_aside import SegmentAside
from dsaux.aux_replica import AuxReplica, TickReport
from dsaux.config import DsauxConfig
from dsaux.data.guard import BatchGuard, batch_digest
from dsaux.schedules import instructions
from dsaux.step_guard import AUX_GRADIENT, StepGuardEngine
from dsaux.transfers import VariableReceiver, VariableSender, WaitMeter
from dsaux.wavefront import Tick

WAVEFRONTS = ("al", "local")
"""Schedules whose stages treat different batches in a tick."""
NO_DATA = "train_batch has no data: pass data_iter on every rank, or call set_dataiterator first."
AUX_FORWARD_TIMER = "aux_forward"
AUX_BACKWARD_TIMER = "aux_backward"
AUX_REDUCE_TIMER = "aux_reduce"
AUX_STEP_TIMER = "aux_step"
AUX_TIMERS = (AUX_FORWARD_TIMER, AUX_BACKWARD_TIMER, AUX_REDUCE_TIMER, AUX_STEP_TIMER)


class LocalStepEngine(StepGuardEngine):
    """What a rank does for each instruction of a penalty or augmented Lagrangian schedule.

    Attributes:
        settings: the checked `dsaux` block of the configuration.
        aux: this rank's replica of the AuxNet.
        aside: the segment that makes this stage's target, where it runs beside the stage; else None.
        wait_meter: time that this rank has lost in waits for others.
        sender: this stage's end of the boundary over which it sends; None where nothing is sent.
        receiver: its end of the boundary over which it receives; None where nothing is received.
        loaded_batches: micro-batches of this tick that were loaded before their turn.
        loss_is_known: whether some batch has come to the last stage, so that `train_batch` has a loss to return.
        boundary_mismatch: relative mismatch per boundary, shape (K-1,): the last value of each, NaN before the first;
            empty where there is no AuxNet, that is under local and 1f1b.
        boundary_adjoint: norm of the adjoint over that of the coupling force, likewise; 0 under penalty.
    """

    data_iterator: Any
    settings: DsauxConfig
    aux: AuxReplica
    aside: SegmentAside | None
    wait_meter: WaitMeter
    sender: VariableSender | None
    receiver: VariableReceiver | None
    boundary_mismatch: Tensor
    boundary_adjoint: Tensor
    loss_is_known: bool

    def _init_local_step(self, settings: DsauxConfig) -> None:
        """Set what belongs to one rank and one tick; DeepSpeed's own constructor has run."""
        self.settings = settings
        self._init_step_guard(settings)
        self.wait_meter = WaitMeter(self.device)
        self.sender = self.receiver = None
        self.batch_fn = self._to_device
        self.pipe_buffers.update({"variables": [], "stage_inputs": [], "sources": []})
        self.aside = None
        self.train_loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        self.train_hits = torch.zeros((), device=self.device, dtype=torch.float64)
        self.train_samples = self.train_batches = 0
        self.boundary_mismatch = self.boundary_adjoint = torch.zeros(0)
        self._output_fn: Callable[[Tensor, Tensor], Tensor] | None = None
        self.loaded_batches: deque[tuple[Tensor, Tensor]] = deque()
        self._guard = BatchGuard(self.grid.pp_group, every=settings.data.guard_every)
        self._report: TickReport | None = None
        self._last_loss = torch.full((), float("nan"), device=self.device)
        self.loss_is_known = False
        self._begin_tick(Tick((0,) * self.num_stages))

    def _begin_tick(self, tick: Tick) -> None:
        self._tick = tick
        self._digest = 0
        self._micro_batch = -1
        self.loaded_batches.clear()  # of a tick that failed half-way
        self._begin_step_guard()

    # ---- data -------------------------------------------------------------------------------------------------------

    def _to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        if batch is None:
            raise RuntimeError(NO_DATA)
        inputs, labels = batch
        is_due = self._output_fn is None and self._guard.is_due(self._tick.steps[self.stage_id])
        if is_due and self._digest == 0:
            self._digest = batch_digest(inputs, labels)
        if self.bfloat16_enabled() and inputs.is_floating_point():
            inputs = inputs.bfloat16()
        inputs = self.module.arrange(inputs.to(self.device, non_blocking=True))
        return inputs, labels.to(self.device, non_blocking=True)

    def _exec_load_replica_batch(self, buffer_id: int) -> None:
        inputs, labels = self.loaded_batches.popleft() if self.loaded_batches else self._next_batch()
        self.begin_micro_batch(buffer_id, inputs, labels)

    def load_ahead(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Load micro-batches of this tick before their turn; the instructions that load take these."""
        self.loaded_batches.extend(self._next_batch() for _ in range(count))
        return list(self.loaded_batches)

    def begin_micro_batch(self, buffer_id: int, inputs: Tensor, labels: Tensor) -> None:
        """Put the next micro-batch of the tick into a buffer."""
        self._micro_batch += 1
        self.pipe_buffers["inputs"][buffer_id] = inputs
        self.pipe_buffers["labels"][buffer_id] = labels

    # ---- one micro-batch --------------------------------------------------------------------------------------------

    def _exec_aux_forward(self, buffer_id: int) -> None:
        """lambda_1 .. lambda_(k+1) with their graph: this stage's own input and, below the last stage, its target."""
        self._start_timer(AUX_FORWARD_TIMER)
        inputs = self.pipe_buffers["inputs"][buffer_id]
        variables: list[Tensor] = []
        if self.aux.run is not None:
            depth = min(self.stage_id + 1, self.module.num_boundaries)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16_enabled()):
                if self.aside is None:
                    variables = self.aux.run(inputs, depth=depth)
                else:
                    variables = self._variables_aside(inputs, buffer_id)
        self.pipe_buffers["variables"][buffer_id] = variables
        self._stop_timer(AUX_FORWARD_TIMER)

    def _variables_aside(self, inputs: Tensor, buffer_id: int) -> list[Tensor]:
        """The same; lambda_(k+1) is under way when this returns, and its graph begins anew at lambda_k."""
        assert self.aux.run is not None
        assert self.aside is not None
        variables = [] if self.is_first_stage() else self.aux.run(inputs, depth=self.stage_id)
        source = variables[-1].detach().requires_grad_() if variables else inputs
        self.pipe_buffers["sources"][buffer_id] = source
        return [*variables, self.aside.forward(source)]

    def _exec_local_forward(self, buffer_id: int) -> None:
        """X_(k+1) = F_k(lambda_k)."""
        variables = self.pipe_buffers["variables"][buffer_id]
        inputs = self.pipe_buffers["inputs"][buffer_id]
        source = inputs if self.is_first_stage() else self._in_stage_precision(variables[self.stage_id - 1], inputs)
        stage_input = source.detach()
        if stage_input.is_floating_point():  # text is whole numbers
            stage_input.requires_grad_(not self.is_first_stage() or self._reentrant_activation_checkpointing())
        self.pipe_buffers["stage_inputs"][buffer_id] = stage_input
        self.pipe_buffers["outputs"][buffer_id] = DeepSpeedEngine.forward(self, stage_input)
        if self.aside is not None:
            self.aside.join()

    def _in_stage_precision(self, variable: Tensor, inputs: Tensor) -> Tensor:
        """An auxiliary variable in the precision of real inputs; of whole numbers there is only the configuration's."""
        if inputs.is_floating_point():
            return variable.to(inputs.dtype)
        return variable.bfloat16() if self.bfloat16_enabled() else variable

    def _exec_penalty_loss(self, buffer_id: int) -> None:
        """The target is what this rank's own AuxNet gives the next stage."""
        if self.is_last_stage():
            self._task_loss(buffer_id)
            return
        target = self.pipe_buffers["variables"][buffer_id][self.stage_id]
        self._coupling_loss(buffer_id, target, scale=self._scale(self.stage_id, target), adjoint=0.0)

    def _exec_lagrangian_loss(self, buffer_id: int) -> None:
        """The target is what the next stage has refreshed in the tick before, with the scale that it used."""
        if self.is_last_stage():
            self._task_loss(buffer_id)
            return
        assert self.receiver is not None, "all stages but the last receive"
        outputs = self.pipe_buffers["outputs"][buffer_id]
        refreshed, scale = self.receiver.read(self._micro_batch)
        refreshed = refreshed.view_as(outputs)
        variable = self.pipe_buffers["variables"][buffer_id][self.stage_id]
        adjoint = objective.adjoint_ratio(variable, refreshed, outputs)
        self._coupling_loss(buffer_id, refreshed, scale=scale, adjoint=adjoint)

    def _task_loss(self, buffer_id: int) -> None:
        outputs, labels = self.pipe_buffers["outputs"][buffer_id], self.pipe_buffers["labels"][buffer_id]
        self.loss = self.module.loss_fn(outputs, labels)
        self._count_hits(outputs, labels)
        self._note_loss(self.loss)
        self.aux.add_loss(self.loss, weight=1.0 / self.micro_batches)
        self.train_loss_sum += self.loss.detach() / self.micro_batches

    def _coupling_loss(self, buffer_id: int, target: Tensor, *, scale: Tensor | float, adjoint: Tensor | float) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        variable = self.pipe_buffers["variables"][buffer_id][self.stage_id]
        self.loss = objective.coupling_loss(outputs, target, beta=self.settings.aux.beta, scale=scale)
        self._note_loss(self.loss)
        self.aux.add_boundary(
            self.stage_id,
            variance=objective.batch_variance(variable),
            mismatch=objective.relative_mismatch(variable, outputs),
            adjoint=adjoint,
            weight=1.0 / self.micro_batches,
        )
        self.train_loss_sum += self.loss.detach() / self.micro_batches

    def _match_force(self, variable: Tensor, outputs: Tensor) -> Tensor:
        """The force on lambda_(k+1) by what this stage makes, its share of the tick's."""
        scale = self._scale(self.stage_id, variable)
        force: Tensor = objective.match_force(variable, outputs, rho=self.settings.aux.rho, scale=scale)
        return force.div_(self.micro_batches)

    def _exec_local_backward(self, buffer_id: int) -> None:
        """Gradients of the stage's weights and g_k; DeepSpeed divides by the number of micro-batches.

        The pass of the segment aside runs beside it. It starts here and not behind the loss: a receive may stand
        between the two, and a CUDA graph holds both ends of what it starts on another stream.
        """
        if self.aside is not None:
            variable = self.pipe_buffers["variables"][buffer_id][self.stage_id]
            outputs = self.pipe_buffers["outputs"][buffer_id]
            self.aside.backward(variable, lambda: self._match_force(variable, outputs))
        DeepSpeedEngine.backward(self, self.loss)
        if self.aside is not None:
            self.aside.join()

    def _exec_refresh_variable(self, buffer_id: int) -> None:
        """lambda'_k of this micro-batch, into the message to the stage before."""
        assert self.sender is not None, "where a schedule sends there is a sender"
        variable = self.pipe_buffers["variables"][buffer_id][self.stage_id - 1]
        # The loss was divided by the number of micro-batches; g_k is the gradient of the micro-batch's own mean.
        gradient = self.pipe_buffers["stage_inputs"][buffer_id].grad * self.micro_batches
        scale = self._scale(self.stage_id - 1, variable)
        refreshed = objective.refreshed_variable(variable, gradient, beta=self.settings.aux.beta, scale=scale)
        self.sender.write(self._micro_batch, refreshed, scale=scale)

    def _exec_aux_backward(self, buffer_id: int) -> None:
        """Forces of this rank's taps, pushed back through T_(k+1) .. T_1 in one backward pass.

        Where T_(k+1) runs aside, its pass is over: what came out of it at lambda_k goes on from there.
        """
        self._start_timer(AUX_BACKWARD_TIMER)
        variables = self.pipe_buffers["variables"][buffer_id]
        taps: list[Tensor] = []
        forces: list[Tensor] = []
        if not self.is_first_stage():
            gradient = self.pipe_buffers["stage_inputs"][buffer_id].grad
            taps.append(variables[self.stage_id - 1])
            forces.append(objective.task_force(gradient, gamma=self.settings.aux.gamma).to(taps[-1].dtype))
            if self.aside is not None:
                forces[-1] = forces[-1] + self.pipe_buffers["sources"][buffer_id].grad
        if not self.is_last_stage() and self.aside is None:
            taps.append(variables[self.stage_id])
            forces.append(self._match_force(taps[-1], self.pipe_buffers["outputs"][buffer_id]))
        if taps:
            torch.autograd.backward(taps, forces)
        for key in ("variables", "stage_inputs", "sources", "outputs", "inputs", "labels"):
            self.pipe_buffers[key][buffer_id] = None
        if self.is_last_micro_batch:
            self._note_gradients()
        self._stop_timer(AUX_BACKWARD_TIMER)

    def _note_gradients(self) -> None:
        super()._note_gradients()
        if self.is_local_schedule and self.aux.net is not None:
            self._note_unless_finite([self.aux.own_gradients], AUX_GRADIENT)

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _exec_send_variable(self) -> None:
        """Pairs with `_exec_recv_variable` of the peer, stage k-1 (under local k+1), in the same tick."""
        assert self.sender is not None, "where a schedule sends there is a sender"
        self.sender.start()

    def _exec_wait_send_variable(self) -> None:
        assert self.sender is not None, "where a schedule sends there is a sender"
        self.sender.wait()

    def _exec_recv_variable(self) -> None:
        """Pairs with `_exec_send_variable` of the peer, stage k+1 (under local k-1), in the same tick."""
        assert self.receiver is not None, "where a schedule receives there is a receiver"
        self.receiver.post()

    def _exec_wait_recv_variable(self) -> None:
        assert self.receiver is not None, "where a schedule receives there is a receiver"
        self.receiver.wait()

    # ---- the AuxNet's step ------------------------------------------------------------------------------------------

    def _exec_reduce_aux_grads(self) -> None:
        """Start the sum of the AuxNet's gradients over all ranks; `_exec_aux_optimizer_step` waits for it."""
        if self._digest:
            self.aux.add_digest(self._digest)
        self.aux.add_flags(self._own_flags())
        self.aux.start_sum(self._tick)

    def _finish_sum(self) -> TickReport:
        """Wait for the sum that was started last and compare the batch digests."""
        self._start_timer(AUX_REDUCE_TIMER)
        report = self.aux.finish_sum(keep_variance=self._skips)
        self._stop_timer(AUX_REDUCE_TIMER)
        self._take_report(report)
        return report

    def _must_skip(self) -> bool:
        """Under penalty a fault of any stage; in a wavefront one of this stage: others have treated the batch."""
        if not self.is_local_schedule:
            return super()._must_skip()
        # The sum says what the other ranks saw: with skipping it is awaited before the step, not behind it.
        self._report = self._finish_sum()
        faults = self._report.flags[1:]
        return bool(faults[self.stage_id] > 0) if self.schedule_name in WAVEFRONTS else bool(faults.sum() > 0)

    def _exec_aux_optimizer_step(self) -> None:
        """Wait for the sum that was started last, unless it has come, and step the AuxNet."""
        report = self._finish_sum() if self._report is None else self._report
        self._report = None
        self._start_timer(AUX_STEP_TIMER)
        # A force that is no number must not reach the AuxNet, whoever it comes from.
        self.aux.step(skip=self._skips and bool(report.flags[1:].sum() > 0))
        self._stop_timer(AUX_STEP_TIMER)
        if self.wall_clock_breakdown() and self.global_steps % self.steps_per_print() == 0:
            self.timers.log(list(AUX_TIMERS))

    def _take_report(self, report: TickReport) -> None:
        if report.tick.has_loss:
            self._last_loss, self.loss_is_known = report.loss, True
        self._take_flags(report.flags)
        if self.aux.net is not None:
            if self.boundary_mismatch.numel() == 0:
                self.boundary_mismatch = torch.full_like(report.mismatch, float("nan"))
                self.boundary_adjoint = self.boundary_mismatch
            self.boundary_mismatch = torch.where(report.has_boundary, report.mismatch, self.boundary_mismatch)
            self.boundary_adjoint = torch.where(report.has_boundary, report.adjoint, self.boundary_adjoint)
        if any(self._guard.is_due(step) for step in report.tick.steps):
            self._guard.add(report.tick.steps, report.digests.tolist())

    def _flags_under_way(self) -> Tensor:
        if not self.is_local_schedule:
            return super()._flags_under_way()
        self.aux.settle()
        return self.aux.newest_flags

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def is_last_micro_batch(self) -> bool:
        """Whether the micro-batch under way is the last one of the tick."""
        return bool(self._micro_batch == self.micro_batches - 1)

    def guard_state(self) -> dict[int, dict[int, int]]:
        """Digests of batches under way, for a checkpoint."""
        return self._guard.state_dict()

    def load_guard_state(self, state: dict[int, dict[int, int]]) -> None:
        """Restore what :meth:`guard_state` gave."""
        self._guard.load_state_dict(state)

    def _count_hits(self, outputs: Tensor, labels: Tensor) -> None:
        if outputs.shape[:-1] == labels.shape:
            self.train_hits += (outputs.detach().argmax(dim=-1) == labels).sum()
            self.train_samples += labels.numel()

    def _scale(self, boundary: int, variable: Tensor) -> Tensor | float:
        """v of a boundary; in the very first step, when there is none yet, the batch's own."""
        if not self.settings.aux.scaled:
            return 1.0
        running = self.aux.variance[boundary]
        if self.aux.has_variance(boundary):
            return running
        return torch.where(running.isnan(), objective.batch_variance(variable).to(running.dtype), running)

    def _start_timer(self, name: str) -> None:
        if self.wall_clock_breakdown():
            self.timers(name).start()

    def _stop_timer(self, name: str) -> None:
        if self.wall_clock_breakdown():
            self.timers(name).stop()

    # DeepSpeed dispatches by exact type through unbound functions: each instruction must stand in the map.
    _INSTRUCTION_MAP = {
        **StepGuardEngine._INSTRUCTION_MAP,
        instructions.ReduceGrads: StepGuardEngine._exec_reduce_grads,
        instructions.OptimizerStep: StepGuardEngine._exec_optimizer_step,
        instructions.LoadReplicaBatch: _exec_load_replica_batch,
        instructions.AuxForward: _exec_aux_forward,
        instructions.LocalForward: _exec_local_forward,
        instructions.PenaltyLoss: _exec_penalty_loss,
        instructions.LagrangianLoss: _exec_lagrangian_loss,
        instructions.LocalBackward: _exec_local_backward,
        instructions.RefreshVariable: _exec_refresh_variable,
        instructions.SendVariable: _exec_send_variable,
        instructions.WaitSendVariable: _exec_wait_send_variable,
        instructions.RecvVariable: _exec_recv_variable,
        instructions.WaitRecvVariable: _exec_wait_recv_variable,
        instructions.AuxBackward: _exec_aux_backward,
        instructions.ReduceAuxGrads: _exec_reduce_aux_grads,
        instructions.AuxOptimizerStep: _exec_aux_optimizer_step,
    }
