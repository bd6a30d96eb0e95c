"""The loop over epochs: train, log, evaluate, save. train.py's last call.

All ranks run the same loop; rank 0 alone writes the run folder and the display. Values of the stages are gathered when
a line is logged, never in between.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from dsaux.assemble import batchnorm_stream, training_stream
from dsaux.config import Config, Launch
from dsaux.data import ImageDataset, test_batches
from dsaux.display import RunDisplay
from dsaux.engine import AuxPipelineEngine
from dsaux.evaluate import Evaluation, evaluate, reestimate_batchnorm
from dsaux.metrics import (
    CHECKPOINT_FOLDER,
    CHECKPOINT_TAG,
    EvalStats,
    FinalStats,
    MismatchAlarm,
    RunFolder,
    StepStats,
    ThroughputMeter,
)
from dsaux.partition import Partition
from dsaux.runtime import peak_memory_bytes

WARMUP_STEPS = 5
"""Steps left out of the throughput: first allocations, the loader's start."""


@dataclass(frozen=True)
class _Gathered:
    """Figures of all ranks since the last log line; the fields are those of `StepStats`."""

    loss: tuple[float | None, ...]
    accuracy: float | None
    waited_ticks: tuple[float, ...]


class Trainer:
    """One run.

    Args:
        config: the checked configuration.
        launch: processes, stages, replicas and batch sizes.
        engine: the engine of this rank.
        dataset: the images.
        partition: how the network is cut.
        folder: run folder; None on all ranks but 0.
        display: what a person sees; None on all ranks but 0.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        *,
        engine: AuxPipelineEngine,
        dataset: ImageDataset,
        partition: Partition,
        folder: RunFolder | None,
        display: RunDisplay | None,
    ) -> None:
        self.config, self.settings, self.launch = config, config.dsaux, launch
        self.engine, self.dataset, self.partition = engine, dataset, partition
        self.folder, self.display = folder, display
        replica = engine.grid.get_data_parallel_rank()
        common = {"dataset": dataset, "replica": replica, "device": engine.device}
        self.stream = training_stream(config, launch, **common)
        self.batchnorm = batchnorm_stream(config, launch, **common)
        self.steps_per_epoch = self.stream.steps_per_epoch
        self.total_steps, _ = planned_steps(config, self.steps_per_epoch)
        self.exact_from = exact_start(config, self.steps_per_epoch)
        self.meter = ThroughputMeter(warmup_steps=WARMUP_STEPS)
        self.alarm = MismatchAlarm()
        self.peak_memory: tuple[int, ...] = ()
        self.mismatch: tuple[float, ...] = ()
        self.adjoint: tuple[float, ...] = ()
        self.waited_s = [0.0] * launch.stages
        self.local_s = self.logged_s = 0.0
        self.step = self.logged_step = 0
        self.is_loaded = False

    def fit(self) -> Evaluation:
        """Train to the end, evaluate, save the network; returns the last evaluation."""
        started = time.perf_counter()
        for text in self.config.settings_without_effect():
            if self.display:
                self.display.warning(text)
        result: Evaluation | None = None
        evaluated_at = -1
        while self.step < self.total_steps:
            self._train_epoch()
            epoch = math.ceil(self.step / self.steps_per_epoch)
            every = self.settings.run.eval_every
            if every and epoch % every == 0 and self.step % self.steps_per_epoch == 0:
                result, evaluated_at = self.evaluate(), self.step
        if result is None or evaluated_at != self.step:
            result = self.evaluate()
        self._save()
        self._finish(result, wall_s=time.perf_counter() - started)
        return result

    def evaluate(self, *, reestimate: bool = True) -> Evaluation:
        """Evaluate the real chain over the whole test set and log it.

        Args:
            reestimate: refresh BatchNorm's statistics first; False for a network that was saved with good ones.
        """
        self.engine.drain()  # training time, not evaluation
        self.meter.pause()
        started = time.perf_counter()
        if reestimate:
            self.batchnorm.seek(0)
            reestimate_batchnorm(self.engine, self.batchnorm, num_batches=self.settings.run.bn_batches)
        batches = test_batches(
            self.dataset,
            loader=self.settings.data.loader,
            replica=self.engine.grid.get_data_parallel_rank(),
            num_replicas=self.launch.replicas,
            batch_size=self.settings.run.eval_batch_size,
            device=self.engine.device,
        )
        result = evaluate(self.engine, iter(batches), num_batches=len(batches))
        stats = EvalStats(
            step=self.step,
            epoch=math.ceil(self.step / self.steps_per_epoch),
            top1=result.top1,
            top5=result.top5,
            loss=result.loss,
            samples=result.samples,
            seconds=time.perf_counter() - started,
            method=self.method,
        )
        if self.folder and self.display:
            self.folder.event("eval", **asdict(stats))
            self.display.evaluation(stats)
        self.meter.resume()
        return result

    @property
    def method(self) -> str:
        """Schedule of the run so far: al, penalty, 1f1b, al+1f1b with exact epochs behind it; or "saved network"."""
        if self.is_loaded:
            return "saved network"
        schedule = self.settings.pipeline.schedule
        return schedule if self.engine.schedule_name == schedule else f"{schedule}+{self.engine.schedule_name}"

    def load(self, folder: Path) -> None:
        """Load the network that a run saved, with any number of stages; the AuxNet and optimizers are not needed."""
        self.is_loaded = True
        path = folder / CHECKPOINT_FOLDER / CHECKPOINT_TAG
        self.engine.module.load_state_dir(str(path), self.engine.checkpoint_engine)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        stop = min(self.total_steps, (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        while self.step < stop:
            if self.step == self.exact_from:
                self._switch_to_exact()
            if self._reads_from_here():
                self.stream.seek(self.step * self.launch.gradient_accumulation_steps)
            loss = self.engine.train_batch(self.stream)
            self.step += 1
            self.meter.step(self.launch.train_batch_size)
            log_is_due = self.step % self.settings.run.log_every == 0 or self.step == self.total_steps
            if log_is_due or self.engine.device.type == "cpu":
                self._check_finite(loss)
            if log_is_due:
                self._log(loss)

    def _reads_from_here(self) -> bool:
        """Whether this rank's next batch is the one of this step; under `al` most stages have earlier ones to read."""
        if self.engine.is_local_schedule:
            return self.engine.wavefront.is_empty
        return bool(self.engine.is_first_stage() or self.engine.is_last_stage())

    def _switch_to_exact(self) -> None:
        lr = self.settings.run.exact_lr
        self.engine.use_exact_schedule(lr=lr, num_steps=self.total_steps - self.step)
        if self.folder and self.display:
            self.folder.event("exact", step=self.step, lr=lr)
            rate = "the present learning rate" if lr is None else f"learning rate {lr:g}"
            self.display.message(f"exact back-propagation (1f1b) from step {self.step} on, with {rate}")

    def _check_finite(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss.item()} in step {self.step}. Lower optimizer.params.lr, set gradient_clipping "
                "(e.g. 5.0), or lengthen the warm-up; a smaller dsaux.aux.beta can help as well."
            )

    def _log(self, loss: torch.Tensor) -> None:
        gathered = self._gather_stages()
        if self.engine.is_local_schedule:
            self.mismatch = tuple(self.engine.boundary_mismatch.tolist())
            if self.engine.schedule_name == "al":
                self.adjoint = tuple(self.engine.boundary_adjoint.tolist())
        if not (self.folder and self.display):
            return
        stats = StepStats(
            step=self.step,
            total_steps=self.total_steps,
            epoch=(self.step - 1) // self.steps_per_epoch + 1,
            epochs=math.ceil(self.total_steps / self.steps_per_epoch),
            loss=float(loss),
            train_accuracy=gathered.accuracy,
            boundary_mismatch=self.mismatch if self.engine.is_local_schedule else (),
            boundary_adjoint=self.adjoint if self.engine.is_local_schedule else (),
            stage_loss=gathered.loss,
            waited_ticks=gathered.waited_ticks,
            samples_per_s=self.meter.recent(),
            learning_rate=float(self.engine.get_lr()[0]),
            peak_memory_bytes=self.peak_memory,
            phase=self.engine.schedule_name,
        )
        self.folder.event("step", **asdict(stats))
        self.display.step(stats)
        is_filled = self.step >= self.launch.stages  # before, al's first stages have no figures yet
        for warning in self.alarm.update(stats.boundary_mismatch if is_filled else (), self.step):
            self.folder.event("warning", step=self.step, text=warning)
            self.display.warning(warning)

    def _gather_stages(self) -> _Gathered:
        """What the stages have done since the last log line."""
        engine, stages = self.engine, self.launch.stages
        row = torch.zeros(2 * stages + 2, dtype=torch.float64, device=engine.device)
        row[engine.stage_id] = engine.train_loss_sum / max(1, engine.train_batches)
        row[stages + engine.stage_id] = engine.wait_meter.take_s()
        row[-2] = engine.train_hits
        row[-1] = engine.train_samples
        peaks = torch.zeros(stages, dtype=torch.float64, device=engine.device)
        peaks[engine.stage_id] = peak_memory_bytes(engine.device)
        torch.distributed.all_reduce(row)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        engine.train_loss_sum.zero_()
        engine.train_hits.zero_()
        engine.train_samples = engine.train_batches = 0
        self.peak_memory = tuple(int(peak) for peak in peaks.tolist())
        *values, hits, samples = row.tolist()
        losses, waits = (
            [value / self.launch.replicas for value in values[part : part + stages]] for part in (0, stages)
        )
        own = [loss if engine.is_local_schedule or stage == stages - 1 else None for stage, loss in enumerate(losses)]
        return _Gathered(tuple(own), hits / samples if samples else None, self._count_waits(waits))

    def _count_waits(self, waits_s: list[float]) -> tuple[float, ...]:
        """Seconds that the stages waited since the last log line, in ticks; nothing under 1f1b."""
        spent_s, self.logged_s = self.meter.training_s - self.logged_s, self.meter.training_s
        steps, self.logged_step = self.step - self.logged_step, self.step
        if not self.engine.is_local_schedule:
            return ()
        self.local_s += spent_s
        self.waited_s = [total + wait for total, wait in zip(self.waited_s, waits_s, strict=True)]
        return tuple(wait * steps / spent_s if spent_s > 0 else 0.0 for wait in waits_s)

    def _save(self) -> None:
        path: list[Any] = [str(self.folder.path / CHECKPOINT_FOLDER) if self.folder else None]
        torch.distributed.broadcast_object_list(path, src=0)
        self.engine.save_checkpoint(path[0], CHECKPOINT_TAG)

    def _finish(self, result: Evaluation, *, wall_s: float) -> None:
        if not (self.folder and self.display):
            return
        final = FinalStats(
            method=self.method,
            schedule=self.settings.pipeline.schedule,
            stages=self.launch.stages,
            replicas=self.launch.replicas,
            epochs=math.ceil(self.step / self.steps_per_epoch),
            exact_epochs=self.settings.run.exact_epochs,
            steps=self.step,
            test_accuracy=result.top1,
            test_top5=result.top5,
            test_loss=result.loss,
            test_samples=result.samples,
            train_samples_per_s=self.meter.overall(),
            wall_s=wall_s,
            wait_share=[wait / self.local_s for wait in self.waited_s] if self.local_s > 0 else [],
            boundary_mismatch=list(self.mismatch),
            boundary_adjoint=list(self.adjoint),
            peak_memory_bytes=list(self.peak_memory),
            seed=self.settings.run.seed,
            bounds=list(self.partition.bounds),
            model=self.settings.model.name,
            data=self.settings.data.name,
        )
        self.folder.event("final", **asdict(final))
        self.display.final(final, str(self.folder.path))


def planned_steps(config: Config, steps_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps of the whole run, and those that the configured learning-rate schedule spans.

    The schedule spans the whole run, but for exact epochs with a learning rate of their own.
    """
    run = config.dsaux.run
    total = run.epochs * steps_per_epoch
    if run.max_steps is not None:
        total = min(total, run.max_steps)
    start = exact_start(config, steps_per_epoch)
    return total, min(total, start) if start is not None and run.exact_lr is not None else total


def exact_start(config: Config, steps_per_epoch: int) -> int | None:
    """Step at which the run goes over to 1f1b; None if it never does."""
    run = config.dsaux.run
    return (run.epochs - run.exact_epochs) * steps_per_epoch if run.exact_epochs else None
