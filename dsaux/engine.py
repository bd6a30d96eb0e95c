"""The engine: DeepSpeed's `PipelineEngine` with schedules for layer-parallel training.

`dsaux.initialize` makes it; the trainer calls `train_batch`, `drain` and `forward_chain`. A local schedule (`penalty`,
`al`, `local`) runs on DeepSpeed's own `_exec_schedule`, with the instructions of `dsaux.local_step` and
`dsaux.greedy_step`; `1f1b` is DeepSpeed's own `TrainSchedule` on the same module, data and optimizer.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.schedule import PipeSchedule, TrainSchedule
from torch import Tensor, nn

from dsaux import engine_state
from dsaux.aux_aside import SegmentAside
from dsaux.aux_replica import AuxReplica
from dsaux.checkpoint import CheckpointError, FoundCheckpoint
from dsaux.compiled import CompiledCall
from dsaux.config import WITHOUT_AUX_NET, DsauxConfig
from dsaux.data.guard import BatchGuard
from dsaux.engine_state import find_together, write_together
from dsaux.greedy_step import GreedyStepEngine
from dsaux.local_step import NO_DATA, WAVEFRONTS
from dsaux.module import AuxPipelineModule
from dsaux.optim import CosineTail, aux_schedule, make_aux_optimizer
from dsaux.optim_state import cycles_momentum
from dsaux.schedules import instructions
from dsaux.schedules.lagrangian import LagrangianSchedule
from dsaux.schedules.local import LAG as LOCAL_LAG
from dsaux.schedules.local import LocalSchedule
from dsaux.schedules.penalty import PenaltySchedule
from dsaux.stage_graph import StageGraphs, graphs_of
from dsaux.transfers import VariableReceiver, VariableSender, boundary_groups
from dsaux.wavefront import Tick, Wavefront

_LAGS = {"penalty": 0, "al": 1, "local": LOCAL_LAG, "1f1b": 0}
"""Ticks from a stage to the one before it."""


class AuxPipelineEngine(GreedyStepEngine):
    """Trains an :class:`~dsaux.AuxPipelineModule`, each stage on its own local loss.

    Made by :func:`dsaux.initialize`, never directly. `train_batch`, `eval_batch`, `save_checkpoint` and
    `load_checkpoint` keep DeepSpeed's meaning; the data iterator must be given on every rank, and all ranks of a
    replica must see the same batches.

    Under `al` the stages work on different batches at a time: a call of `train_batch` treats its batch on the last
    stage and the batches of the K-1 calls before on the other ones, each stage reading its iterator when its turn
    comes. Under `local` it is the first stage that is ahead, and the last one is K-1 batches behind it. The engine
    catches up (:meth:`drain`) before an evaluation, a checkpoint or a change of schedule; a script that looks at
    weights after its last call does so itself.

    Attributes:
        stage_graphs: runs the ticks as CUDA graphs; None where `dsaux.run.cuda_graphs` is off.

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
        self._init_local_step(settings)
        self._aux_optimizer = aux_optimizer
        # Asked now: behind the exact epochs' own schedule the momentum stays where this one had left it.
        self.cycles_momentum = cycles_momentum(self.lr_scheduler)
        self.restored_notes: list[str] = []
        self.schedule_name = settings.pipeline.schedule
        has_boundaries = self.num_stages > 1
        if self.schedule_name not in WITHOUT_AUX_NET and has_boundaries and self.module.aux_net is None:
            raise ValueError(
                f"schedule {self.schedule_name} with {self.num_stages} stages needs an AuxNet; give AuxPipelineModule "
                "an aux_net (dsaux.models.auxnet.build_aux_net), or set dsaux.pipeline.schedule to 1f1b."
            )
        if self.schedule_name == "local" and has_boundaries and not self.module.has_local_heads:
            raise ValueError(
                f"schedule local with {self.num_stages} stages needs local heads; give AuxPipelineModule local_heads "
                "(dsaux.models.local_heads.build_local_heads), or set dsaux.pipeline.schedule to 1f1b."
            )
        if self.bfloat16_enabled():
            self.module.keep_batchnorm_in_float32()
        self._keep_norms_local()
        if not self.is_data_parallel and self.optimizer is self.basic_optimizer:
            # One replica and no wrapped optimizer: there is nothing to reduce, and flattening would only cost time.
            self.pipeline_enable_backward_allreduce = False
        if settings.run.channels_last:
            # Of a wrapped optimizer's flat tensor the weights are views, and must stay so.
            self.module.use_channels_last(weights=self.optimizer is self.basic_optimizer)
        self.aux = self._make_aux_replica()
        if settings.run.compile:
            self.module.compile_training()
            if self.aux.net is not None:
                self.aux.run = CompiledCall(self.aux.net, name="the AuxNet", buffers=self.aux.net.buffers())
        if settings.run.aux_stream and self.aux.net is not None and self.stage_id < self.num_stages - 1:
            self.aside = self._make_aside(self.aux.net.segments[self.stage_id])
        self.wavefront = Wavefront(self.num_stages, self.stage_id, lag=_LAGS[self.schedule_name])
        self._boundary_groups = boundary_groups(self.grid.pipe_groups) if self.schedule_name in WAVEFRONTS else {}
        self._open_boundaries()
        self.stage_graphs: StageGraphs | None = graphs_of(self)

    def _make_aside(self, segment: nn.Module) -> SegmentAside:
        if not self.settings.run.compile:
            return SegmentAside(segment, self.device)
        name = "the AuxNet's segment behind the stage"
        return SegmentAside(CompiledCall(segment, name=name, buffers=segment.buffers()), self.device)

    # ---- schedules ------------------------------------------------------------------------------------------------

    def _train_schedule(self) -> PipeSchedule:
        shape = (self.micro_batches, self.num_stages, self.stage_id)
        if self.schedule_name in WAVEFRONTS:
            return self._wavefront_schedule(num_batches=None)
        return PenaltySchedule(*shape) if self.schedule_name == "penalty" else TrainSchedule(*shape)

    def _wavefront_schedule(self, *, num_batches: int | None) -> PipeSchedule:
        shape = (self.micro_batches, self.num_stages, self.stage_id)
        tick = self.wavefront.tick
        if self.schedule_name == "local":
            return LocalSchedule(*shape, tick=tick, num_batches=num_batches)
        return LagrangianSchedule(*shape, tick=tick, num_batches=num_batches, overlap=self.settings.aux.overlap)

    def use_exact_schedule(self, *, lr: float | None, num_steps: int) -> None:
        """Go on with DeepSpeed's 1F1B, that is exact back-propagation; batches under way are finished before.

        Args:
            lr: learning rate to start from, falling to zero as a cosine; None goes on with the present schedule.
            num_steps: length of that cosine in optimizer steps.
        """
        self.drain()
        self._set_schedule("1f1b")
        self.boundary_mismatch = self.boundary_adjoint = torch.zeros(0)
        if lr is not None:
            self.lr_scheduler = CosineTail(self.optimizer, lr=lr, num_steps=num_steps)

    def _set_schedule(self, name: str) -> None:
        self.schedule_name = name
        if self.stage_graphs is not None:
            self.stage_graphs.drop()
        self.wavefront = Wavefront(self.num_stages, self.stage_id, lag=_LAGS[name])

    # ---- one step -------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Train on one batch per replica (`gradient_accumulation_steps` micro-batches from the iterator).

        Args:
            data_iter: iterator of (inputs, labels) micro-batches; None goes on with the one set before. Under `al` a
                stage reads its batch up to K-1 calls later, under `local` likewise: the iterator must still hold it
                then.

        Returns:
            Loss of the last stage on this batch, mean over the global batch; the same scalar on every rank. With
            `dsaux.aux.overlap` the loss of the batch before, from the second call on. Under `local` a batch comes to
            the last stage K-1 calls after it was given, so this is the loss of the newest batch that has come there:
            NaN before the first has (`loss_is_known` is False), and in the K-1 calls behind a drain the loss of the
            last batch before it.

        Raises:
            RuntimeError: if the ranks of a replica saw different batches, or no data was given.
        """
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        if self.is_local_schedule:
            if self.data_iterator is None:  # said at once, also by a stage whose turn to read comes later
                raise RuntimeError(NO_DATA)
            if self.wavefront.is_empty:
                self.aux.begin()  # a step that failed half-way may have left gradients
            self.wavefront.enter(self.data_iterator, step=self.global_steps)
            loss: Tensor = self._run_tick(super().train_batch)
            self._count_ahead(-1)
            return loss
        self._begin_tick(Tick((self.global_steps,) * self.num_stages))
        loss = super().train_batch()
        self.train_batches += 1
        self.loss_is_known = True
        self._compare_exact_digests()
        self._exchange_flags()
        return loss

    def drain(self) -> None:
        """Let every stage finish the batches that have entered; a collective call of all ranks.

        Does nothing where none is under way, that is always under `penalty` and `1f1b`.
        """
        if self.wavefront.is_empty:
            return
        modes = {module: module.training for module in self.module.modules()}
        self.module.train()
        with torch.enable_grad():
            while not self.wavefront.is_empty:
                self._run_tick(self._drain_tick)
        for module, is_training in modes.items():
            module.training = is_training

    def settle(self) -> None:
        """Wait for this rank's messages and sums under way, and leave them where the next step looks for them.

        Between two calls of `train_batch` all of them have been started on every rank: no step is needed for them to
        come. What is trained does not change.
        """
        self.aux.settle()
        self._settle_flags()
        if self.sender is not None:
            self.sender.wait()
        if self.receiver is not None:
            self.receiver.settle()

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        """DeepSpeed's; with `dsaux.run.cuda_graphs` all but the communication of a tick is replayed as CUDA graphs."""
        eagerly = functools.partial(super()._exec_schedule, pipe_schedule)
        if self.stage_graphs is None:
            eagerly()
        else:
            self.stage_graphs.run(pipe_schedule, eagerly)

    def _drain_tick(self) -> None:
        self._exec_schedule(self._wavefront_schedule(num_batches=self.wavefront.num_batches))

    def _run_tick(self, run: Callable[[], Tensor | None]) -> Any:
        """Run the schedule of the present tick on this stage's own data."""
        newest = self.data_iterator
        self._begin_tick(self.wavefront.present())
        # A batch that was under way when the run was saved comes from the iterator of the run that goes on.
        self.data_iterator = self.wavefront.take_data() or newest
        self.train_batches += self._tick.steps[self.stage_id] is not None
        try:
            return run()
        finally:
            self.data_iterator = newest
            self.wavefront.advance()

    def _aggregate_total_loss(self) -> Tensor:
        if not self.is_local_schedule:
            return super()._aggregate_total_loss()  # type: ignore[no-any-return]
        # The loss came with the AuxNet's sum: no broadcast over the pipe group. It belongs to the batch that has
        # entered, and DeepSpeed now prints and records it under this rank's own counts, which may be behind.
        self._count_ahead(+1)
        return self._last_loss

    def _count_ahead(self, sign: int) -> None:
        """Add the batches that this stage has yet to treat to DeepSpeed's counts, or take them away again."""
        self.global_steps += sign * self.wavefront.num_unread
        self.global_samples += sign * self.wavefront.num_unread * self.train_batch_size()

    def _compare_exact_digests(self) -> None:
        if not self._guard.is_due(self._tick.steps[0]):
            return
        digests = torch.zeros(self.grid.world_size, device=self.device)
        digests[self.global_rank] = self._digest
        dist.all_reduce(digests, group=self.module.world_group)
        # A guard of its own: the stages in the middle read no batch, so this step would never be complete.
        BatchGuard(self.grid.pp_group, every=1).add(self._tick.steps, digests.tolist())

    def set_dataiterator(self, iterator: Any) -> None:
        """Set the iterator of training data; every rank reads it (in DeepSpeed's engine first and last stage)."""
        self.training_dataloader = None
        self.data_iterator = iterator

    def set_dataloader(self, loader: Any) -> None:
        """Set the loader of training data; every rank reads it."""
        self.training_dataloader = loader
        self.data_iterator = iter(loader)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """DeepSpeed's `set_train_batch_size`; batches under way are finished before."""
        self.drain()
        super().set_train_batch_size(train_batch_size)
        self._open_boundaries()

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's `eval_batch`, through the real chain of the stages; batches under way are finished before."""
        self.drain()
        return super().eval_batch(*args, **kwargs)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """DeepSpeed's forward pass; on the last stage it also counts the right answers of a training batch."""
        super()._exec_forward_pass(buffer_id)
        if not self.is_last_stage():
            outputs = self.pipe_buffers["outputs"][buffer_id]
            if isinstance(outputs, Tensor):  # gloo sends no other; layers that transpose, as patches do, hand on such
                self.pipe_buffers["outputs"][buffer_id] = outputs.contiguous()
            return
        outputs, labels = self.pipe_buffers["outputs"][buffer_id], self.pipe_buffers["labels"][buffer_id]
        if self._output_fn is None and torch.is_grad_enabled():
            self.train_loss_sum += self.loss.detach() / self.micro_batches
            self._note_loss(self.loss)
            self._count_hits(outputs, labels)

    # ---- the real chain, without the AuxNet -----------------------------------------------------------------------

    def forward_chain(
        self,
        data_iter: Iterator[tuple[Tensor, Tensor]],
        output_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        num_micro_batches: int,
    ) -> Tensor | None:
        """Run micro-batches forward through the real chain F_(K-1) o .. o F_0; the AuxNet is not used.

        Batches under way are finished before.

        Activations go from stage to stage with DeepSpeed's `InferenceSchedule`. The caller sets train or eval mode.

        Args:
            data_iter: iterator of (inputs, labels), the same number on every rank.
            output_fn: `output_fn(outputs, labels) -> tensor` of a fixed shape, called on the last stage.
            num_micro_batches: how many micro-batches to run.

        Returns:
            Sum of `output_fn` over the micro-batches on the last stage, None elsewhere.
        """
        self.drain()
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

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def entered_steps(self) -> int:
        """Batches that have entered: optimizer steps of the stage where they do, which no other is ahead of."""
        return int(self.global_steps) + self.wavefront.num_unread

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        *,
        drain: bool = True,
        about: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write a checkpoint; a collective call of all ranks. Arguments and meaning are those of DeepSpeed's engine.

        The folder has DeepSpeed's layer files, and beside them the AuxNet and all optimizer state, by layer
        (`dsaux.checkpoint`). It is complete and verified when it appears under its name.

        Args:
            save_dir: folder of the checkpoints.
            tag: name of this one; "global_step<n>" by default.
            client_state: the caller's own state: tensors, numbers, strings, lists and dicts of them.
            save_latest: let the file `latest` name it.
            drain: finish the batches under way before, so that all stages have taken the same steps. Without, they are
                saved as they are, and the run goes on as if it had not been saved.
            about: further entries of the manifest.

        Raises:
            CheckpointError: on all ranks, if one of them could not write its part; what was there before still is.
        """
        if drain:
            self.drain()
        name = str(tag) if tag is not None else f"global_step{self.entered_steps}"
        content = {
            "step": self.entered_steps,
            "layout": engine_state.describe_layout(self),
            "configured_schedule": self.settings.pipeline.schedule,
            "num_layers": int(self.module.parts[-1]),
            "is_drained": self.wavefront.is_empty,
            "deepspeed": deepspeed.__version__,
            "torch": str(torch.__version__),
            "exact_tail": self.lr_scheduler.state_dict() if isinstance(self.lr_scheduler, CosineTail) else None,
            **(about or {}),
        }
        write_together(
            Path(save_dir), name, engine=self, client_state=client_state or {}, content=content, latest=save_latest
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        *,
        found: FoundCheckpoint | None = None,
        keep_schedule: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Restore a checkpoint; a collective call of all ranks. Batches under way are finished before.

        With the stages, bounds, replicas and micro-batches that it was written with, what follows is the same to the
        bit; then the next iterator of data must go on at the first batch that this rank has yet to read, number
        `global_steps`. With others, layers and their optimizer state are dealt anew. Where the run had gone over to
        exact epochs, this engine does as well.

        Args:
            load_dir: folder of the checkpoints, or a run folder.
            tag: which one; by default the newest that is whole.
            found: a checkpoint that rank 0 has found already, the same on all ranks.
            keep_schedule: stay under the present schedule, whatever the checkpoint was written under.

        Returns:
            Folder of the checkpoint and the caller's own state. `restored_notes` then says what could not be carried.

        Raises:
            ConfigError: on all ranks, if there is no checkpoint that is whole.
            CheckpointError: if it is of another network, or the ranks do not see the same files.
        """
        self.drain()
        self.forget_faults()
        if self.stage_graphs is not None:
            self.stage_graphs.drop()
        if found is None:
            found = find_together(Path(load_dir) / tag if tag is not None else Path(load_dir))
        if self.is_local_schedule and not keep_schedule and engine_state.is_in_exact_epochs(found.content):
            tail = found.content.get("exact_tail")
            self.use_exact_schedule(lr=tail and tail["lr"], num_steps=tail["num_steps"] if tail else 1)
        try:
            client_state, notes = engine_state.restore(self, found)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{found.path} does not hold what a checkpoint of dsaux holds ({type(error).__name__}: {error}). Give "
                "another one."
            ) from error
        self.restored_notes = [*found.skipped, *notes]
        return str(found.path), client_state

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
            meter=self.wait_meter,
        )

    def _open_boundaries(self) -> None:
        """Make the ends of this stage's boundaries for the present number of micro-batches."""
        ranks, common = self.grid.pp_group, {"micro_batches": self.micro_batches, "meter": self.wait_meter}
        for before, behind in itertools.pairwise(ranks):
            if (before, behind) not in self._boundary_groups:
                continue
            ends = {"group": self._boundary_groups[before, behind], "transport": self.settings.aux.transport, **common}
            # Refreshed variables go up, outputs of the stages go down.
            source, sink = (before, behind) if self.schedule_name == "local" else (behind, before)
            if self.global_rank == source:
                self.sender = VariableSender(peer=sink, **ends)
            elif self.global_rank == sink:
                self.receiver = VariableReceiver(peer=source, device=self.device, **ends)

    def _make_aux_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        assert self._aux_optimizer is not None, "initialize gives one wherever there is an AuxNet"
        return make_aux_optimizer(parameters, *self._aux_optimizer)

    def _make_aux_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The stages' schedule for the AuxNet, which steps by the batches that enter; None leaves its rate as it is."""
        if self.client_lr_scheduler is None:
            return self._aux_scheduler_from_config(optimizer)
        if callable(self.client_lr_scheduler):
            return self.client_lr_scheduler(optimizer)
        if self.global_rank == 0:
            logging.getLogger("dsaux").warning(
                "lr_scheduler is a schedule of the stages' optimizer alone; the AuxNet's learning rate stays as it is."
                " Give dsaux.initialize a callable that makes a schedule for an optimizer."
            )
        return None

    def _aux_scheduler_from_config(self, optimizer: torch.optim.Optimizer) -> Any:
        name = self.scheduler_name()
        lr = (self.settings.aux.optimizer or {}).get("params", {}).get("lr")
        if name is None or lr is None:
            return self._scheduler_from_config(optimizer)
        stage_lr = self.basic_optimizer.defaults["lr"]  # not the group's, which the schedule has moved by now
        params = aux_schedule(name, self.scheduler_params(), lr=lr, stage_lr=stage_lr)
        return getattr(lr_schedules, name)(optimizer, **params)

    # DeepSpeed dispatches by exact type through unbound functions: an overriding method must stand in the map again.
    _INSTRUCTION_MAP = {**GreedyStepEngine._INSTRUCTION_MAP, instructions.ForwardPass: _exec_forward_pass}
