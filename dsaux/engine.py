"""The engine: DeepSpeed's `PipelineEngine` with instructions for layer-parallel training.

`dsaux.initialize` makes it; the trainer calls `train_batch` and `forward_chain`. A local schedule (penalty) runs on
DeepSpeed's own `_exec_schedule`; `1f1b` is DeepSpeed's own `TrainSchedule` on the same module, data and optimizer.
Formulas are in `dsaux.objective`, the AuxNet's side of a step in `dsaux.aux_replica`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from dsaux import objective
from dsaux.aux_replica import AuxReplica
from dsaux.config import DsauxConfig
from dsaux.data.guard import batch_digest
from dsaux.module import AuxPipelineModule
from dsaux.optim import CosineTail, make_aux_optimizer
from dsaux.schedules import SCHEDULES, instructions

AUX_FORWARD_TIMER = "aux_forward"
AUX_BACKWARD_TIMER = "aux_backward"
AUX_REDUCE_TIMER = "aux_reduce"
AUX_STEP_TIMER = "aux_step"
AUX_TIMERS = (AUX_FORWARD_TIMER, AUX_BACKWARD_TIMER, AUX_REDUCE_TIMER, AUX_STEP_TIMER)


class AuxPipelineEngine(PipelineEngine):  # type: ignore[misc]
    """Trains an :class:`~dsaux.AuxPipelineModule`, each stage on its own local loss.

    Made by :func:`dsaux.initialize`, never directly. `train_batch`, `eval_batch`, `save_checkpoint` and
    `load_checkpoint` keep DeepSpeed's meaning; the data iterator must be given on every rank, and all ranks of a
    replica must see the same batches.

    Args:
        settings: the checked `dsaux` block of the configuration.
        aux_optimizer: name in `torch.optim` and parameters of the AuxNet's optimizer; None where there is no AuxNet.
        args: arguments of DeepSpeed's `PipelineEngine`.
        kwargs: further arguments of it.
    """

    def __init__(
        self, *args: Any, settings: DsauxConfig, aux_optimizer: tuple[str, dict[str, Any]] | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.module, AuxPipelineModule):
            raise TypeError(f"model is {type(self.module).__name__}; dsaux.initialize needs a dsaux.AuxPipelineModule.")
        self.settings, self._aux_optimizer = settings, aux_optimizer
        self.schedule_name = settings.pipeline.schedule
        if self.schedule_name != "1f1b" and self.num_stages > 1 and self.module.aux_net is None:
            raise ValueError(
                f"schedule {self.schedule_name} with {self.num_stages} stages needs an AuxNet; give AuxPipelineModule "
                "an aux_net (dsaux.models.auxnet.build_aux_net), or set dsaux.pipeline.schedule to 1f1b."
            )
        if self.bfloat16_enabled():
            self.module.keep_batchnorm_in_float32()
        self.batch_fn = self._to_device
        self._keep_norms_local()
        if not self.is_data_parallel and self.optimizer is self.basic_optimizer:
            # One replica and no wrapped optimizer: there is nothing to reduce, and flattening would only cost time.
            self.pipeline_enable_backward_allreduce = False
        self.aux = self._make_aux_replica()
        self.pipe_buffers.update({"variables": [], "stage_inputs": []})
        self.train_loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        self.train_hits = torch.zeros((), device=self.device, dtype=torch.float64)
        self.train_samples = 0
        self._output_fn: Callable[[Tensor, Tensor], Tensor] | None = None
        self._digest = self._this_step = 0
        self.boundary_mismatch = torch.zeros(0)
        """Relative mismatch per boundary of the last local step, shape (K-1,); empty under 1f1b."""

    # ---- schedules ------------------------------------------------------------------------------------------------

    @property
    def is_local_schedule(self) -> bool:
        """True while stages train on local losses, False under 1f1b."""
        return self.schedule_name != "1f1b"

    def _train_schedule(self) -> Any:
        return SCHEDULES[self.schedule_name](self.micro_batches, self.num_stages, self.stage_id)

    def use_exact_schedule(self, *, lr: float | None, num_steps: int) -> None:
        """Go on with DeepSpeed's 1F1B, that is exact back-propagation.

        Args:
            lr: learning rate to start from, falling to zero as a cosine; None goes on with the present schedule.
            num_steps: length of that cosine in optimizer steps.
        """
        self.schedule_name = "1f1b"
        self.boundary_mismatch = torch.zeros(0)
        if lr is not None:
            self.lr_scheduler = CosineTail(self.optimizer, lr=lr, num_steps=num_steps)

    # ---- one step -------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Train on one batch per replica (`gradient_accumulation_steps` micro-batches from the iterator).

        Args:
            data_iter: iterator of (inputs, labels) micro-batches; None goes on with the one set before.

        Returns:
            Loss of the last stage, mean over the global batch; the same scalar on every rank.

        Raises:
            RuntimeError: if the ranks of a replica saw different batches, or no data was given.
        """
        self._digest, self._this_step = 0, self.global_steps
        self.aux.begin()
        loss: Tensor = super().train_batch(data_iter)
        if not self.is_local_schedule and self._guard_is_due(self._this_step):
            digests = torch.zeros(self.grid.world_size, device=self.device)
            digests[self.global_rank] = self._digest
            dist.all_reduce(digests, group=self.module.world_group)
            self._compare_digests(digests)
        return loss

    def _aggregate_total_loss(self) -> Tensor:
        # Under a local schedule the loss came with the AuxNet's sum: no broadcast over the pipe group.
        return self._tick.loss if self.is_local_schedule else super()._aggregate_total_loss()

    def set_dataiterator(self, iterator: Any) -> None:
        """Set the iterator of training data; every rank reads it (in DeepSpeed's engine first and last stage)."""
        self.training_dataloader = None
        self.data_iterator = iterator

    def set_dataloader(self, loader: Any) -> None:
        """Set the loader of training data; every rank reads it."""
        self.training_dataloader = loader
        self.data_iterator = iter(loader)

    def _to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        if batch is None:
            raise RuntimeError("train_batch has no data: pass data_iter on every rank, or call set_dataiterator first.")
        inputs, labels = batch
        if self._digest == 0 and self._output_fn is None and self._guard_is_due(self._this_step):
            self._digest = batch_digest(inputs, labels)
        if self.bfloat16_enabled() and inputs.is_floating_point():
            inputs = inputs.bfloat16()
        return inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _exec_load_replica_batch(self, buffer_id: int) -> None:
        inputs, labels = self._next_batch()
        self.pipe_buffers["inputs"][buffer_id] = inputs
        self.pipe_buffers["labels"][buffer_id] = labels

    def _exec_aux_forward(self, buffer_id: int) -> None:
        """lambda_1 .. lambda_(k+1) with their graph: this stage's own input and, below the last stage, its target."""
        self._start_timer(AUX_FORWARD_TIMER)
        inputs = self.pipe_buffers["inputs"][buffer_id]
        variables: list[Tensor] = []
        if self.aux.net is not None:
            depth = min(self.stage_id + 1, self.module.num_boundaries)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16_enabled()):
                variables = self.aux.net(inputs, depth=depth)
        self.pipe_buffers["variables"][buffer_id] = variables
        self._stop_timer(AUX_FORWARD_TIMER)

    def _exec_local_forward(self, buffer_id: int) -> None:
        """X_(k+1) = F_k(lambda_k), and the stage's local loss."""
        variables = self.pipe_buffers["variables"][buffer_id]
        inputs = self.pipe_buffers["inputs"][buffer_id]
        source = inputs if self.is_first_stage() else variables[self.stage_id - 1].to(inputs.dtype)
        stage_input = source.detach()
        stage_input.requires_grad_(not self.is_first_stage() or self._reentrant_activation_checkpointing())
        outputs = DeepSpeedEngine.forward(self, stage_input)
        self.pipe_buffers["stage_inputs"][buffer_id] = stage_input
        self.pipe_buffers["outputs"][buffer_id] = outputs
        weight = 1.0 / self.micro_batches
        if self.is_last_stage():
            self.loss = self.module.loss_fn(outputs, self.pipe_buffers["labels"][buffer_id])
            self._count_hits(outputs, self.pipe_buffers["labels"][buffer_id])
            self.aux.add_loss(self.loss, weight=weight)
        else:
            target = variables[self.stage_id]
            self.loss = objective.coupling_loss(
                outputs, target, beta=self.settings.aux.beta, scale=self._scale(self.stage_id, target)
            )
            self.aux.add_boundary(
                self.stage_id,
                variance=objective.batch_variance(target),
                mismatch=objective.relative_mismatch(target, outputs),
                weight=weight,
            )
        self.train_loss_sum += weight * self.loss.detach()

    def _exec_local_backward(self, buffer_id: int) -> None:
        """Gradients of the stage's weights and g_k; DeepSpeed divides by the number of micro-batches."""
        DeepSpeedEngine.backward(self, self.loss)

    def _exec_aux_backward(self, buffer_id: int) -> None:
        """Forces of this rank's taps, pushed back through T_(k+1) .. T_1 in one backward pass."""
        self._start_timer(AUX_BACKWARD_TIMER)
        variables = self.pipe_buffers["variables"][buffer_id]
        taps: list[Tensor] = []
        forces: list[Tensor] = []
        if not self.is_first_stage():
            gradient = self.pipe_buffers["stage_inputs"][buffer_id].grad
            taps.append(variables[self.stage_id - 1])
            forces.append(objective.task_force(gradient, gamma=self.settings.aux.gamma).to(taps[-1].dtype))
        if not self.is_last_stage():
            target, outputs = variables[self.stage_id], self.pipe_buffers["outputs"][buffer_id]
            force = objective.match_force(
                target, outputs, rho=self.settings.aux.rho, scale=self._scale(self.stage_id, target)
            )
            taps.append(target)
            forces.append(force / self.micro_batches)
        if taps:
            torch.autograd.backward(taps, forces)
        for key in ("variables", "stage_inputs", "outputs", "inputs", "labels"):
            self.pipe_buffers[key][buffer_id] = None
        self._stop_timer(AUX_BACKWARD_TIMER)

    def _exec_reduce_aux_grads(self) -> None:
        """Start the sum of the AuxNet's gradients over all ranks; `_exec_aux_optimizer_step` waits for it."""
        if self._digest:
            self.aux.add_digest(self._digest)
        self.aux.start_sum()

    def _exec_aux_optimizer_step(self) -> None:
        """Wait for the sum that `_exec_reduce_aux_grads` started, compare the batch digests, step the AuxNet."""
        self._start_timer(AUX_REDUCE_TIMER)
        self._tick = self.aux.finish_sum()
        self._stop_timer(AUX_REDUCE_TIMER)
        self.boundary_mismatch = self._tick.mismatch
        if self._digest:
            self._compare_digests(self._tick.digests)
        self._start_timer(AUX_STEP_TIMER)
        self.aux.step()
        self._stop_timer(AUX_STEP_TIMER)
        if self.wall_clock_breakdown() and self.global_steps % self.steps_per_print() == 0:
            self.timers.log(list(AUX_TIMERS))

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """DeepSpeed's forward pass; on the last stage it also counts the right answers of a training batch."""
        super()._exec_forward_pass(buffer_id)
        if not self.is_last_stage():
            return
        outputs, labels = self.pipe_buffers["outputs"][buffer_id], self.pipe_buffers["labels"][buffer_id]
        if self._output_fn is None and torch.is_grad_enabled():
            self.train_loss_sum += self.loss.detach() / self.micro_batches
            self._count_hits(outputs, labels)

    def _count_hits(self, outputs: Tensor, labels: Tensor) -> None:
        if outputs.ndim == 2 and labels.ndim == 1:
            self.train_hits += (outputs.detach().argmax(dim=1) == labels).sum()
            self.train_samples += labels.numel()

    def _scale(self, boundary: int, variable: Tensor) -> Tensor | float:
        """v of a boundary; in the very first step, when there is none yet, the batch's own."""
        if not self.settings.aux.scaled:
            return 1.0
        running = self.aux.variance[boundary]
        return torch.where(running.isnan(), objective.batch_variance(variable).to(running.dtype), running)

    # ---- the real chain, without the AuxNet -----------------------------------------------------------------------

    def forward_chain(
        self,
        data_iter: Iterator[tuple[Tensor, Tensor]],
        output_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        num_micro_batches: int,
    ) -> Tensor | None:
        """Run micro-batches forward through the real chain F_(K-1) o .. o F_0; the AuxNet is not used.

        Activations go from stage to stage with DeepSpeed's `InferenceSchedule`. The caller sets train or eval mode.

        Args:
            data_iter: iterator of (inputs, labels), the same number on every rank.
            output_fn: `output_fn(outputs, labels) -> tensor` of a fixed shape, called on the last stage.
            num_micro_batches: how many micro-batches to run.

        Returns:
            Sum of `output_fn` over the micro-batches on the last stage, None elsewhere.
        """
        self.reset_activation_shape()
        training_iterator, loss_fn = self.data_iterator, self.module.loss_fn
        self.data_iterator, self.module.loss_fn, self._output_fn = data_iter, output_fn, output_fn
        self._compute_loss, self.total_loss = True, None
        try:
            dist.barrier(group=self.module.world_group)
            with torch.no_grad():
                self._exec_schedule(self._inference_schedule(num_micro_batches))
            total = self.total_loss
        finally:
            self.data_iterator, self.module.loss_fn, self._output_fn = training_iterator, loss_fn, None
            self.total_loss = None
            self.reset_activation_shape()
        return total

    # ---- what DeepSpeed does across stages and a decoupled step must not --------------------------------------------

    def clip_fp32_gradients(self) -> None:
        """Clip by the norm of this stage's own gradient; no stage waits for another's norm."""
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.gradient_clipping())

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Average the stage's gradients over the data group; float64, which DeepSpeed refuses, one by one."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None and p.grad.dtype == torch.float64]
        if not gradients:
            super().allreduce_gradients(*args, **kwargs)
            return
        for gradient in gradients:
            dist.all_reduce(gradient, group=self.mpu.get_data_parallel_group())
            gradient.div_(self.dp_world_size)

    def _keep_norms_local(self) -> None:
        """ZeRO-1 and the bf16 optimizer sum norms and overflow flags over all stages: keep them to the stage."""
        if isinstance(self.optimizer, BF16_Optimizer):
            self.optimizer.mpu = None
        elif hasattr(self.optimizer, "model_parallel_group"):
            self.optimizer.model_parallel_group = None
            self.optimizer.model_parallel_world_size = 1

    # ---- batch-hash guard -------------------------------------------------------------------------------------------

    def _guard_is_due(self, step: int) -> bool:
        every = self.settings.data.guard_every
        return self.num_stages > 1 and (step == 0 or (every > 0 and step % every == 0))

    def _compare_digests(self, digests: Tensor) -> None:
        mine = {rank: int(digests[rank]) for rank in self.grid.pp_group if digests[rank] != 0}
        if len(set(mine.values())) > 1:
            seen = ", ".join(f"rank {rank}: {digest:06x}" for rank, digest in mine.items())
            raise RuntimeError(
                f"the ranks of one replica saw different batches in step {self._this_step} ({seen}). All stages must "
                "read the same stream: same dsaux.data block and seed, same library versions, same kind of device."
            )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """DeepSpeed's `save_checkpoint`; the AuxNet, its optimizer and the running variances go with it."""
        state = {**(client_state or {}), "dsaux": {"aux": self.aux.state_dict(), "schedule": self.schedule_name}}
        return super().save_checkpoint(save_dir, tag, client_state=state, **kwargs)

    def load_checkpoint(self, load_dir: str, tag: str | None = None, **kwargs: Any) -> Any:
        """DeepSpeed's `load_checkpoint`; restores the AuxNet's side as well."""
        path, client_state = super().load_checkpoint(load_dir, tag, **kwargs)
        if path is not None and "dsaux" in client_state:
            state = client_state.pop("dsaux")
            self.aux.load_state_dict(state["aux"])
            self.schedule_name = state["schedule"]
        return path, client_state

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _make_aux_replica(self) -> AuxReplica:
        net = self.module.aux_net
        if net is not None:
            net.to(self.device)
        weights = self.module if net is None else net
        exact = any(parameter.dtype == torch.float64 for parameter in weights.parameters())
        return AuxReplica(
            net,
            self.module.num_boundaries,
            num_replicas=self.dp_world_size,
            rank=self.global_rank,
            world_size=dist.get_world_size(),
            group=self.module.world_group,
            make_optimizer=self._make_aux_optimizer,
            make_scheduler=self._make_aux_scheduler,
            clip_norm=self.gradient_clipping(),
            device=self.device,
            dtype=torch.float64 if exact else torch.float32,
        )

    def _make_aux_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        assert self._aux_optimizer is not None, "initialize gives one wherever there is an AuxNet"
        return make_aux_optimizer(parameters, *self._aux_optimizer)

    def _make_aux_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        if self.client_lr_scheduler is None:
            return self._scheduler_from_config(optimizer)
        return self.client_lr_scheduler(optimizer) if callable(self.client_lr_scheduler) else None

    def _start_timer(self, name: str) -> None:
        if self.wall_clock_breakdown():
            self.timers(name).start()

    def _stop_timer(self, name: str) -> None:
        if self.wall_clock_breakdown():
            self.timers(name).stop()

    # DeepSpeed dispatches by exact type through unbound functions: an overriding method must stand in the map again.
    _INSTRUCTION_MAP = {
        **PipelineEngine._INSTRUCTION_MAP,
        instructions.ForwardPass: _exec_forward_pass,
        instructions.LoadReplicaBatch: _exec_load_replica_batch,
        instructions.AuxForward: _exec_aux_forward,
        instructions.LocalForward: _exec_local_forward,
        instructions.LocalBackward: _exec_local_backward,
        instructions.AuxBackward: _exec_aux_backward,
        instructions.ReduceAuxGrads: _exec_reduce_aux_grads,
        instructions.AuxOptimizerStep: _exec_aux_optimizer_step,
    }
