"""The loop over steps: train, log, evaluate, save. train.py's last call.

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

from dsaux.assemble import batchnorm_stream, evaluation_batches, node_group, training_stream
from dsaux.checkpoint import CHECKPOINT_FOLDER, CheckpointError, FoundCheckpoint, keep_newest
from dsaux.config import Config, ConfigError, Launch
from dsaux.data import Dataset
from dsaux.display import RunDisplay
from dsaux.engine import AuxPipelineEngine
from dsaux.engine_state import is_in_exact_epochs, load_network
from dsaux.evaluate import Evaluation, evaluate, reestimate_batchnorm
from dsaux.metrics import (
    EvalStats,
    FinalStats,
    MismatchAlarm,
    RunFolder,
    StepStats,
    ThroughputMeter,
    skip_when_full,
)
from dsaux.partition import Partition
from dsaux.profile_run import StepProfiler
from dsaux.resume import changes_since
from dsaux.runtime import Stopped, peak_memory_bytes, stop_signals
from dsaux.watch import Watch
from dsaux.watch_rules import DivergedError

_MEND = (
    "Lower optimizer.params.lr, set gradient_clipping (e.g. 5.0), or lengthen the warm-up; a smaller dsaux.aux.beta "
    "can help as well."
)
"""What helps where a loss is no finite number."""
WARMUP_STEPS = 5
"""Steps left out of the throughput: first allocations, the loader's start."""


@dataclass(frozen=True)
class _Gathered:
    """Figures of all ranks since the last log line; the fields are those of `StepStats`."""

    loss: tuple[float | None, ...]
    accuracy: float | None
    waited_ticks: tuple[float, ...]
    skipped_steps: int


class Trainer:
    """One run.

    Args:
        config: the checked configuration.
        launch: processes, stages, replicas and batch sizes.
        engine: the engine of this rank.
        dataset: what is trained on.
        partition: how the network is cut.
        folder: run folder; None on all ranks but 0.
        display: what a person sees; None on all ranks but 0.
        watch: is told what this rank does.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        *,
        engine: AuxPipelineEngine,
        dataset: Dataset,
        partition: Partition,
        folder: RunFolder | None,
        display: RunDisplay | None,
        watch: Watch,
    ) -> None:
        self.config, self.settings, self.launch = config, config.dsaux, launch
        self.engine, self.dataset, self.partition = engine, dataset, partition
        self.folder, self.display, self.watch = folder, display, watch
        replica = engine.grid.get_data_parallel_rank()
        common = {"dataset": dataset, "replica": replica, "device": engine.device}
        share = node_group(config, launch, replica=replica, stage=engine.stage_id)
        self.stream = training_stream(config, launch, **common, share=share)
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
        self.skipped_steps = 0
        self.evaluated_at = self.saved_at = -1
        self.saved_is_evaluated = False
        self.trained_s = 0.0
        self.is_loaded = False
        every = self.settings.run.checkpoint_every
        self.checkpoint_every = self.steps_per_epoch if every is None else every
        self.checkpoints = _checkpoint_folder(folder)
        self.profile = self._make_profile(0)
        if engine.stage_graphs is not None and folder is not None:
            engine.stage_graphs.tell = self._warn

    def fit(self) -> Evaluation:
        """Train to the end, evaluate, save; returns the last evaluation.

        Raises:
            Stopped: if a signal asked for it; the run is saved and can go on.
        """
        started = time.perf_counter() - self.trained_s
        if self.folder and self.display:
            self.folder.go_on_when_full(self.display.warning)
            monitor, tell = self.engine.monitor, self.display.warning
            monitor.write_events = skip_when_full(monitor.write_events, what="what DeepSpeed monitors", tell=tell)
        for text in self.config.settings_without_effect():
            self._warn(text)
        digest = getattr(self.dataset, "digest", None)
        if self.folder and digest is not None:  # another Python may have another text
            self.folder.event("data", name=self.dataset.name, sha256=digest)
        result: Evaluation | None = None
        if self.engine.is_local_schedule or self._reads_from_here():
            self.stream.begin()
        else:
            self.stream.leave()
        self.profile = self._make_profile(self.settings.run.profile_steps)
        with stop_signals(self.engine.request_stop) as signals, self.profile:
            if self.step < self.total_steps and self._evaluation_is_due():  # the run was stopped just before it
                result = self.evaluate()
            while self.step < self.total_steps:
                self._train_step()
                self.trained_s = time.perf_counter() - started
                if self.engine.stop_is_agreed:
                    self._stop(signals)
                if self._evaluation_is_due():
                    result = self.evaluate()
                if self.checkpoint_every and self.step % self.checkpoint_every == 0 and self.step < self.total_steps:
                    self._save_on_the_way()
            self.profile.finish()
            if self.profile.is_due:
                self._write_profile()
            if result is None or self.evaluated_at != self.step:
                result = self.evaluate()
            self._save()
        self._finish(result, wall_s=time.perf_counter() - started)
        return result

    def resume(self, found: FoundCheckpoint) -> None:
        """Go on from a checkpoint, the same on all ranks; before :meth:`fit`."""
        self.watch.progress(step=found.step, activity="loading a checkpoint")
        was_exact = is_in_exact_epochs(found.content)
        is_exact = self.exact_from is not None and found.step >= self.exact_from
        if was_exact and is_exact and self.engine.is_local_schedule:
            done = (found.content.get("exact_tail") or {}).get("steps_done", 0)
            num_steps = self.total_steps - (found.step - done)
            self.engine.use_exact_schedule(lr=self.settings.run.exact_lr, num_steps=num_steps)
        try:
            _, state = self.engine.load_checkpoint(found.path, found=found, keep_schedule=True)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        mine = state.get("trainer", {})
        self.step = self.logged_step = found.step
        for name in _KEPT:
            setattr(self, name, mine.get(name, getattr(self, name)))
        self.mismatch, self.adjoint = tuple(self.mismatch), tuple(self.adjoint)
        if found.path.parent.resolve() == self.checkpoints.resolve():
            self.saved_at, self.saved_is_evaluated = found.step, bool(found.content.get("is_evaluated", False))
        if len(self.waited_s) != self.launch.stages:  # figures of other stages
            self.waited_s, self.local_s, self.mismatch, self.adjoint = [0.0] * self.launch.stages, 0.0, (), ()
        if found.content["layout"]["schedule"] != self.engine.schedule_name:  # figures of another method
            self.mismatch, self.adjoint = (), ()
        notes = [*self.engine.restored_notes, *changes_since(found.content, self.config)]
        if was_exact and self.engine.is_local_schedule:
            notes.append(
                f"The checkpoint lies in exact epochs; those of this run come later, or not at all: it goes on under "
                f"{self.engine.schedule_name}."
            )
        # This rank's next batch, where batches were under way; else the stream is set with the step.
        self.stream.seek(self.engine.global_steps * self.launch.gradient_accumulation_steps)
        self.engine.set_dataiterator(self.stream)  # an evaluation may have to finish them before the first step
        if self.folder and self.display:
            self.folder.event("resumed", step=self.step, checkpoint=str(found.path), notes=notes)
            self.display.message(f"resumed from step {self.step} of {self.total_steps}: {found.path}")
            if self.step >= self.total_steps:
                self.display.message(f"nothing is left to train. Raise {self._limit()} to go on.")
        for note in notes:
            self._warn(note)

    def _limit(self) -> str:
        """What ends the run, for a message."""
        run = self.settings.run
        if run.max_steps is not None and run.max_steps < run.epochs * self.steps_per_epoch:
            return f"dsaux.run.max_steps above {run.max_steps}"
        return f"dsaux.run.epochs above {run.epochs}"

    def evaluate(self, *, reestimate: bool = True) -> Evaluation:
        """Evaluate the real chain over the whole test set and log it.

        Args:
            reestimate: refresh BatchNorm's statistics first; False for a network that was saved with good ones.
        """
        self.watch.progress(activity="evaluation")
        self.profile.interrupt()
        self.engine.drain()  # training time, not evaluation
        self.meter.pause()
        started = time.perf_counter()
        if reestimate:
            self.batchnorm.seek(0)
            reestimate_batchnorm(self.engine, self.batchnorm, num_batches=self.settings.run.bn_batches)
        replica, device = self.engine.grid.get_data_parallel_rank(), self.engine.device
        batches = evaluation_batches(self.config, self.launch, dataset=self.dataset, replica=replica, device=device)
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
            unit=self.dataset.input_spec.unit,
        )
        if self.folder and self.display:
            self.folder.event("eval", **asdict(stats))
            self.display.evaluation(stats)
        self.evaluated_at = self.step
        self.meter.resume()
        if not math.isfinite(result.loss):
            self._report_divergence(result.loss)
        return result

    @property
    def method(self) -> str:
        """Schedule of the run so far: al, penalty, 1f1b, al+1f1b with exact epochs behind it; or "saved network"."""
        if self.is_loaded:
            return "saved network"
        schedule = self.settings.pipeline.schedule
        return schedule if self.engine.schedule_name == schedule else f"{schedule}+{self.engine.schedule_name}"

    def load(self, found: FoundCheckpoint) -> bool:
        """Load the network of a checkpoint, with any number of stages; AuxNet and optimizers are not needed.

        Returns:
            Whether its BatchNorm statistics are those of the real chain, that is whether it was saved behind an
            evaluation.
        """
        self.is_loaded = True
        try:
            load_network(self.engine, found)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        self.step = found.step
        for text in found.skipped:
            self._warn(text)
        if not found.content["is_drained"]:
            self._warn("The checkpoint was saved with batches under way: its stages are up to K-1 steps apart.")
        return bool(found.content.get("is_evaluated", False))

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        if self.exact_from is not None and self.step >= self.exact_from and self.engine.is_local_schedule:
            self._switch_to_exact()
        if self._reads_from_here():
            self.stream.seek(self.step * self.launch.gradient_accumulation_steps)
        self.watch.progress(step=self.step + 1, activity="training step")
        with self.profile.step(self.step + 1):
            self.loss = self.engine.train_batch(self.stream)
        self.step += 1
        self.meter.step(self.launch.train_batch_size)
        if self.profile.is_due:
            self._write_profile()
        log_is_due = self.step % self.settings.run.log_every == 0 or self.step == self.total_steps
        overlaps = self.settings.aux.overlap  # then the flags of this step are under way, and a wait for them costs
        if log_is_due or self.engine.device.type == "cpu":
            self._check_finite(wait=log_is_due or not overlaps)
        if log_is_due:
            self._log(self.loss)

    def _evaluation_is_due(self) -> bool:
        every = self.settings.run.eval_every
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        return bool(every) and self.step > 0 and rest == 0 and epochs % every == 0 and self.evaluated_at != self.step

    def _reads_from_here(self) -> bool:
        """Whether this rank's next batch is the one of this step; in a wavefront most stages have earlier ones."""
        if self.engine.is_local_schedule:
            return self.engine.wavefront.is_empty
        return bool(self.engine.is_first_stage() or self.engine.is_last_stage())

    def _switch_to_exact(self) -> None:
        lr = self.settings.run.exact_lr
        self.engine.use_exact_schedule(lr=lr, num_steps=self.total_steps - self.step)
        if not self._reads_from_here():
            self.stream.leave()
        if self.folder and self.display:
            self.folder.event("exact", step=self.step, lr=lr)
            rate = "the present learning rate" if lr is None else f"learning rate {lr:g}"
            self.display.message(f"exact back-propagation (1f1b) from step {self.step} on, with {rate}")

    def _check_finite(self, *, wait: bool) -> None:
        """Stop where a loss or a gradient was no number, on all ranks; `wait` as in the engine's `find_fault`."""
        if self.settings.run.nan == "skip":
            return
        fault = self.engine.find_fault(wait=wait)
        if fault is not None:
            is_late = self.engine.device.type != "cpu" or self.settings.aux.overlap
            when = f"in step {self.step}{' or before it' if is_late else ''}"
            hint = "A root or a logarithm of 0 can be the reason. " if "gradient" in fault else ""
            raise DivergedError(f"{fault} is not a finite number {when}. {hint}{_MEND}")
        if self.engine.loss_is_known and not bool(torch.isfinite(self.loss)):
            raise DivergedError(f"the loss is {self.loss.item()} in step {self.step}. {_MEND}")

    def _report_divergence(self, test_loss: float) -> None:
        """A network that trains may yet score beyond all numbers: its last step was too large."""
        story = f"the test loss is {test_loss} behind step {self.step}: the network has diverged. {_MEND}"
        if self.settings.run.nan == "stop" and not self.is_loaded:
            raise DivergedError(story)
        if self.display:
            self.display.message(f"warning: {story}")

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
            skipped_steps=gathered.skipped_steps,
        )
        if gathered.skipped_steps > self.skipped_steps:
            self._warn(
                f"{gathered.skipped_steps} steps were left out so far: a loss or gradient was no finite number "
                '(dsaux.run.nan is "skip")'
            )
        self.skipped_steps = gathered.skipped_steps
        self.folder.event("step", **asdict(stats))
        self.display.step(stats)
        is_filled = self.step >= self.launch.stages  # before, al's first stages have no figures yet
        for warning in self.alarm.update(stats.boundary_mismatch if is_filled else (), self.step):
            self._warn(warning)

    def _warn(self, text: str) -> None:
        if self.folder and self.display:
            self.folder.event("warning", step=self.step, text=text)
            self.display.warning(text)

    def _gather_stages(self) -> _Gathered:
        """What the stages have done since the last log line."""
        engine, stages = self.engine, self.launch.stages
        row = torch.zeros(2 * stages + 2, dtype=torch.float64, device=engine.device)
        row[engine.stage_id] = engine.train_loss_sum / max(1, engine.train_batches)
        row[stages + engine.stage_id] = engine.wait_meter.take_s()
        row[-2] = engine.train_hits
        row[-1] = engine.train_samples
        peaks = torch.zeros(stages + 1, dtype=torch.float64, device=engine.device)
        peaks[engine.stage_id] = peak_memory_bytes(engine.device)
        peaks[-1] = engine.skipped_steps
        torch.distributed.all_reduce(row)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        engine.train_loss_sum.zero_()
        engine.train_hits.zero_()
        engine.train_samples = engine.train_batches = 0
        *peak_memory, skipped_steps = (int(value) for value in peaks.tolist())
        self.peak_memory = tuple(peak_memory)
        *values, hits, samples = row.tolist()
        losses, waits = (
            [value / self.launch.replicas for value in values[part : part + stages]] for part in (0, stages)
        )
        own = [loss if engine.is_local_schedule or stage == stages - 1 else None for stage, loss in enumerate(losses)]
        return _Gathered(tuple(own), hits / samples if samples else None, self._count_waits(waits), skipped_steps)

    def _count_waits(self, waits_s: list[float]) -> tuple[float, ...]:
        """Seconds that the stages waited since the last log line, in ticks; nothing under 1f1b."""
        spent_s, self.logged_s = self.meter.training_s - self.logged_s, self.meter.training_s
        steps, self.logged_step = self.step - self.logged_step, self.step
        if not self.engine.is_local_schedule:
            return ()
        self.local_s += spent_s
        self.waited_s = [total + wait for total, wait in zip(self.waited_s, waits_s, strict=True)]
        return tuple(wait * steps / spent_s if spent_s > 0 else 0.0 for wait in waits_s)

    # ---- profile ----------------------------------------------------------------------------------------------------

    def _make_profile(self, num_steps: int) -> StepProfiler:
        return StepProfiler(
            self.engine, folder=self.checkpoints.parent, num_steps=num_steps, num_left=self.total_steps - self.step
        )

    def _write_profile(self) -> None:
        self.watch.progress(activity="writing the profile")
        self.meter.pause()
        what = self.profile.describe()
        self.profile.write()
        self.meter.resume()
        if self.folder and self.display and not self.profile.problems:
            self.folder.event("profile", step=self.step, folder=str(self.profile.folder))
            self.display.message(f"profile: {what}; python -m dsaux.profile {self.profile.folder.parent}")

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        """Save this step, batches under way included; to save does not change the run."""
        is_evaluated = self.evaluated_at == self.step
        if self.saved_at == self.step and is_evaluated in (self.saved_is_evaluated, False):
            return self.checkpoints / _tag(self.step)
        if self.step > 0 and hasattr(self, "loss"):
            self._check_finite(wait=True)  # on a GPU nothing is looked at in every step
        self.watch.progress(activity="saving a checkpoint")
        self.profile.interrupt()
        self.meter.pause()
        started = time.perf_counter()
        self.engine.save_checkpoint(
            self.checkpoints,
            _tag(self.step),
            {"trainer": {name: _plain(getattr(self, name)) for name in _KEPT}},
            drain=False,
            about={
                "config": self.config.to_dict(),
                "train_batch_size": self.launch.train_batch_size,
                "is_evaluated": is_evaluated,
            },
        )
        self.saved_at, self.saved_is_evaluated = self.step, is_evaluated
        if self.folder:
            keep_newest(self.checkpoints, self.settings.run.keep)
            self.folder.event("checkpoint", step=self.step, seconds=time.perf_counter() - started)
        self.meter.resume()
        return self.checkpoints / _tag(self.step)

    def _save_on_the_way(self) -> None:
        try:
            self._save()
        except CheckpointError as error:  # all ranks raise it: the run goes on, with the checkpoint before
            self.meter.resume()
            self._warn(str(error))

    def _stop(self, signals: list[str]) -> None:
        name = signals[0] if signals else "a signal on another rank"
        path = self._save()
        if self.folder:
            self.folder.event("stopped", step=self.step, signal=name, checkpoint=str(path))
        raise Stopped(
            f"stopped by {name} after step {self.step}, saved in {path}. Go on with --resume {path.parent.parent}"
        )

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _finish(self, result: Evaluation, *, wall_s: float) -> None:
        self.watch.progress(activity="end of the run")
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
            unit=self.dataset.input_spec.unit,
        )
        self.folder.event("final", **asdict(final))
        self.display.final(final, str(self.folder.path))


_KEPT = ("evaluated_at", "trained_s", "waited_s", "local_s", "mismatch", "adjoint", "skipped_steps")
"""What a trainer remembers beside the engine."""


def _tag(step: int) -> str:
    return f"step_{step:08d}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _checkpoint_folder(folder: RunFolder | None) -> Path:
    """Where rank 0 keeps the run's checkpoints; a collective call of all ranks."""
    path: list[Any] = [str(folder.path / CHECKPOINT_FOLDER) if folder else None]
    torch.distributed.broadcast_object_list(path, src=0)
    return Path(path[0])


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
