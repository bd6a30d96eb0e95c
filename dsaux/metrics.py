"""What a run records: its folder, its figures, its throughput and its alarm.

The trainer makes the figures, `dsaux.report` opens the folder, `dsaux.display` shows both. The tools and
benchmarks read `metrics.jsonl` alone: one JSON object a line, "event" and "time_s" first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsaux.checkpoint import CHECKPOINT_FOLDER, has_checkpoint
from dsaux.config_rules import ConfigError

RUNS_FOLDER = "runs"
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
MISMATCH_LIMIT = 0.2
"""Relative mismatch that is too much; good runs have 0.01 to 0.05."""
RECENT_STEPS = 20

Clock = Callable[[], float]


@dataclass(frozen=True)
class StepStats:
    """Figures of one log line.

    Attributes:
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        epoch: epoch of this step, from 1.
        epochs: epochs of the whole run.
        loss: cross-entropy of the last stage in this step.
        train_accuracy: top-1 of the last stage since the last log line, 0 to 1; None without samples.
        boundary_mismatch: ||X - lambda||^2 / Var(X) per boundary, K-1 values; empty where there is no AuxNet.
        boundary_adjoint: norm of the adjoint over that of the coupling force per boundary, K-1 values; empty where no
            adjoint is sent. Well above 1 a stage follows the task, well below 1 the AuxNet.
        stage_loss: mean local loss per stage since the last log line; None for a stage that has no loss of its own.
        waited_ticks: time that each stage lost in waits for others since the last log line, in ticks (the time of a
            step), mean over its replicas; empty under 1f1b, whose waits DeepSpeed does not tell.
        samples_per_s: training throughput over about the last 20 steps.
        learning_rate: of the stages' optimizer.
        peak_memory_bytes: largest memory so far per stage, over its replicas.
        phase: name of the schedule; "1f1b" is exact back-propagation.
        skipped_steps: batches left out so far because a loss or gradient was no finite number.
    """

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    train_accuracy: float | None
    boundary_mismatch: Sequence[float]
    boundary_adjoint: Sequence[float]
    stage_loss: Sequence[float | None]
    waited_ticks: Sequence[float]
    samples_per_s: float
    learning_rate: float
    peak_memory_bytes: Sequence[int]
    phase: str
    skipped_steps: int = 0


@dataclass(frozen=True)
class EvalStats:
    """Figures of one evaluation over the whole test set; accuracies are shares from 0 to 1.

    Attributes:
        step: optimizer steps done before it.
        epoch: epochs done before it.
        top1: share of labels that have the highest score.
        top5: share of labels that are among the five highest scores.
        loss: mean cross-entropy.
        samples: test labels.
        seconds: time it took, the re-estimation of BatchNorm included.
        method: schedule that trained the network so far.
        unit: what has a label, "images" or "tokens".
    """

    step: int
    epoch: int
    top1: float
    top5: float
    loss: float
    samples: int
    seconds: float
    method: str
    unit: str = "images"


@dataclass(frozen=True)
class FinalStats:
    """The result of a run: what was trained, how well, how fast. Units as in `StepStats` and `EvalStats`.

    Attributes:
        wait_share: share of the training time that each stage lost in waits for others; empty for a run of 1f1b alone.
    """

    method: str
    schedule: str
    stages: int
    replicas: int
    epochs: int
    exact_epochs: int
    steps: int
    test_accuracy: float
    test_top5: float
    test_loss: float
    test_samples: int
    train_samples_per_s: float
    wall_s: float
    wait_share: Sequence[float]
    boundary_mismatch: Sequence[float]
    boundary_adjoint: Sequence[float]
    peak_memory_bytes: Sequence[int]
    seed: int
    bounds: Sequence[int]
    model: str
    data: str
    unit: str = "images"


@dataclass(frozen=True)
class StageRow:
    """What one rank holds.

    Attributes:
        rank: global rank.
        host: host name.
        device: e.g. "cuda:0".
        replica: data-parallel rank.
        stage: pipeline stage.
        first_layer: name of the stage's first layer.
        last_layer: name of its last layer.
        parameters: number of the stage's parameters, without the AuxNet.
        share: the stage's part of the partition's cost, 0 to 1; None if the costs are not known.
    """

    rank: int
    host: str
    device: str
    replica: int
    stage: int
    first_layer: str
    last_layer: str
    parameters: int
    share: float | None


class RunFolder:
    """The folder of one run.

    Args:
        path: an existing folder.
        clock: seconds from any start; for tests.
    """

    def __init__(self, path: Path, *, clock: Clock = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._start = clock()
        self._append: Callable[[str], object] = partial(_append_line, path / METRICS_FILE)

    def go_on_when_full(self, tell: Callable[[str], None]) -> None:
        """From now on leave events out that the disk does not take (:func:`skip_when_full`)."""
        self._append = skip_when_full(self._append, what=str(self.path / METRICS_FILE), tell=tell)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append one line to metrics.jsonl; other processes can read it when this returns.

        Args:
            kind: name of the event.
            fields: JSON values, paths, or scalars and arrays of numpy or torch; NaN and inf become null.

        Raises:
            TypeError: for a value that JSON cannot hold.
            OSError: if the file cannot be written, before :meth:`go_on_when_full`.
        """
        line = {"event": kind, "time_s": round(self._clock() - self._start, 6), **fields}
        self._append(_json(line))

    def write_config(self, document: Mapping[str, Any]) -> None:
        """Write the effective configuration to config.json."""
        self._write(CONFIG_FILE, document)

    def write_environment(self, document: Mapping[str, Any]) -> None:
        """Write what `dsaux.environment` found to environment.json."""
        self._write(ENVIRONMENT_FILE, document)

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a file that is whole whenever it is there: other ranks read it, and a run may be killed at any time."""
        growing = self.path / f".{name}.partial"
        try:
            with growing.open("w", encoding="utf-8") as file:
                file.write(_json(document, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(growing, self.path / name)
        finally:
            growing.unlink(missing_ok=True)


def create_run_folder(run_dir: Path | None, name: str) -> RunFolder:
    """Make the folder of a new run; a run that is there already is never touched.

    Args:
        run_dir: the folder to use; None takes runs/<name>, or the first free one of runs/<name>-2, -3, ...
        name: name of the run.

    Raises:
        ConfigError: if `run_dir` holds a run, or the folder cannot be made or written.
    """
    if run_dir is not None:
        if not _claim(run_dir):
            raise ConfigError(
                f"--run_dir {run_dir} holds a run already. Give another folder, or remove this one first."
            )
        return RunFolder(run_dir)
    number = 1
    while True:
        path = Path(RUNS_FOLDER, name if number == 1 else f"{name}-{number}")
        if _claim(path):
            return RunFolder(path)
        number += 1


def check_saved_run(path: Path) -> None:
    """Refuse a folder that holds no finished run; reads only, so that every rank can call it.

    Raises:
        ConfigError: names what is missing.
    """
    if not (path / CONFIG_FILE).is_file():
        state = f"has no {CONFIG_FILE}" if path.is_dir() else "is not a folder"
    elif not has_checkpoint(path):
        state = f"has no saved network in {CHECKPOINT_FOLDER}/"
    else:
        return
    raise ConfigError(
        f"--run_dir {path} {state}; --eval_only needs the folder of a run that has saved one. Give that folder."
    )


def open_run_folder(path: Path) -> RunFolder:
    """Open the folder of an earlier run, which `check_saved_run` has let through, to add to it.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        (path / METRICS_FILE).open("a").close()
    except OSError as error:
        raise _not_writable(path, error) from error
    return RunFolder(path)


def skip_when_full(write: Callable[..., object], *, what: str, tell: Callable[[str], None]) -> Callable[..., None]:
    """A writer of figures that leaves out what the disk does not take: training is worth more.

    Args:
        write: raises OSError where the disk is full.
        what: name of what it writes.
        tell: is given a sentence the first time that it fails.
    """
    is_told = False

    def write_or_skip(*args: Any, **kwargs: Any) -> None:
        nonlocal is_told
        try:
            write(*args, **kwargs)
        except OSError as error:
            if not is_told:
                reason = error.strerror or error
                tell(f"{what} cannot be written: {reason}. Training goes on; figures are left out until there is room.")
            is_told = True

    return write_or_skip


class ThroughputMeter:
    """Training samples per second, by the wall clock, without the time between `pause` and `resume`.

    Args:
        warmup_steps: first steps that `overall` leaves out.
        clock: seconds from any start; for tests.
    """

    def __init__(self, warmup_steps: int, *, clock: Clock = time.perf_counter) -> None:
        self._warmup_left = warmup_steps
        self._clock = clock
        self._running_since: float | None = clock()
        self._step_s = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)
        self._warmup = (0, 0.0)
        self._steady = (0, 0.0)

    def step(self, samples: int) -> None:
        """Count one finished step of `samples` samples."""
        self._take_time()
        self._recent.append((samples, self._step_s))
        if self._warmup_left > 0:
            self._warmup_left -= 1
            self._warmup = (self._warmup[0] + samples, self._warmup[1] + self._step_s)
        else:
            self._steady = (self._steady[0] + samples, self._steady[1] + self._step_s)
        self._step_s = 0.0

    def pause(self) -> None:
        """Stop the clock, for an evaluation or a checkpoint."""
        self._take_time()
        self._running_since = None

    def resume(self) -> None:
        """Start the clock again."""
        self._take_time()
        self._running_since = self._clock()

    def recent(self) -> float:
        """Samples per second over the last 20 steps; 0.0 before the first."""
        return _rate(sum(samples for samples, _ in self._recent), sum(seconds for _, seconds in self._recent))

    def overall(self) -> float:
        """Samples per second after the warm-up, or in it where no step came after; 0.0 for no step.

        Time since the last step up to a pause counts: it is spent on the batches that are still under way.
        """
        samples, seconds = self._steady if self._steady[0] else self._warmup
        return _rate(samples, seconds + self._step_s)

    @property
    def training_s(self) -> float:
        """Seconds of training so far, as far as steps and pauses have told."""
        return self._warmup[1] + self._steady[1] + self._step_s

    def _take_time(self) -> None:
        if self._running_since is not None:
            now = self._clock()
            self._step_s += now - self._running_since
            self._running_since = now


class MismatchAlarm:
    """Warns of a boundary where the real chain has left the AuxNet, once each time that this happens.

    Args:
        threshold: relative mismatch that is too much.
        patience: log lines running that it must be so.
    """

    def __init__(self, threshold: float = MISMATCH_LIMIT, patience: int = 3) -> None:
        self.threshold, self.patience = threshold, patience
        self._lines_above: dict[int, int] = {}

    def update(self, mismatch: Sequence[float], step: int) -> list[str]:
        """Take the relative mismatch of every boundary at one log line; returns the warnings that are due.

        Args:
            mismatch: K-1 values, that between stages 0 and 1 first; empty where there is no AuxNet.
            step: optimizer steps done.
        """
        warnings = []
        for boundary, value in enumerate(mismatch):
            is_above = not value <= self.threshold  # so that NaN counts as above
            lines = self._lines_above.get(boundary, 0) + 1 if is_above else 0
            self._lines_above[boundary] = lines
            if lines == self.patience:
                warnings.append(self._text(boundary, value, step))
        return warnings

    def _text(self, boundary: int, value: float, step: int) -> str:
        return (
            f"the relative mismatch between stages {boundary} and {boundary + 1} is {value:.3f} at step"
            f" {step}, above {self.threshold:g} in {self.patience} log lines running: the network that"
            " is evaluated differs from the one that its stages are trained on. Raise dsaux.aux.beta, or"
            " use a deeper or wider AuxNet (dsaux.aux.depth, dsaux.aux.width)."
        )


def _append_line(path: Path, text: str) -> None:
    """Append a whole line, or nothing where there is no room; behind half a line, of a killed run, it begins anew."""
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(end - 1)
        is_whole = end == 0 or file.read(1) == b"\n"
        rest = (b"" if is_whole else b"\n") + f"{text}\n".encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _claim(path: Path) -> bool:
    """Make the folder and its empty metrics.jsonl; False if it holds a run, even one that starts now."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / CONFIG_FILE).exists():
            return False
        with (path / METRICS_FILE).open("x"):
            return True
    except OSError as error:
        if isinstance(error, FileExistsError) and path.is_dir():
            return False
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> ConfigError:
    reason = "it is a file" if path.is_file() else error.strerror or str(error)
    return ConfigError(f"the run folder {path} cannot be written: {reason}. Give --run_dir a folder that can be.")


def _json(document: Mapping[str, Any], *, indent: int | None = None) -> str:
    return json.dumps(_plain(document), allow_nan=False, ensure_ascii=False, indent=indent)


def _plain(value: Any) -> Any:
    """The value as JSON holds it: no NaN, no tuples, no arrays."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # scalars and arrays of numpy and torch
        return _plain(value.tolist())
    raise TypeError(f"an event holds a {type(value).__name__}; give numbers, text, lists or dictionaries.")


def _rate(samples: int, seconds: float) -> float:
    return samples / seconds if seconds > 0 else 0.0
