"""The profile of a training run (`dsaux.run.profile_steps`): what the trainer times and traces, and the files of it.

Behind the warm-up, with n = `profile_steps`, on every rank:

    steps      ... warm-up | n: clock on the instructions | n: trace of PyTorch's profiler | ...

The two are apart because a trace takes time of its own, which would be in the terms. Only steps count in which every
stage has a batch: those that fill a wavefront, at the start and behind an evaluation, would flatter stages that rest.
`python -m dsaux.profile` reads the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dsaux.environment import describe_environment
from dsaux.profile import OTHER, InstructionClock
from dsaux.profile_files import FORMAT, PROFILE_FOLDER, terms_file, trace_file

WARM_UP_STEPS = 10
"""Steps that are not profiled: first allocations, the loader's and cuDNN's start, compilation; fewer in short runs."""


class StepProfiler:
    """Profiles some steps of one rank; a context around the training, behind which what there is has been written.

    Nothing in it is a collective, and what is trained is the same with and without.

    Args:
        engine: the engine of this rank.
        folder: run folder; the files go into `profile/` in it.
        num_steps: steps to time, and as many to trace; 0 for none.
        num_left: steps that the run still takes.
    """

    def __init__(self, engine: Any, *, folder: Path, num_steps: int, num_left: int) -> None:
        self._engine, self.folder, self._num_steps = engine, folder / PROFILE_FOLDER, num_steps
        self._warm_up_left = min(WARM_UP_STEPS, max(0, num_left - 2 * num_steps))
        self._clock: InstructionClock | None = None
        self._timed: list[int] = []
        self._traced: list[int] = []
        self._trace: Any = None
        self._is_tracing = False
        self._schedule = ""
        self._is_over = num_steps == 0
        self.problems: list[str] = []

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._is_tracing:  # another rank may be gone: its messages, without which no trace may end, never come
            self._traced = []
        self.write()
        for text in self.problems:
            print(f"[rank {self._engine.global_rank}] warning: {text}", file=sys.stderr, flush=True)
        self.problems.clear()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the step of the block, if it is the turn of one.

        Args:
            number: of the step, from 1 at the start of the run.
        """
        if self._timed and self._engine.schedule_name != self._schedule:  # exact epochs begin: terms of two methods
            self.finish()
        if self._is_over or self._warm_up_left > 0 or not self._engine.wavefront.will_be_full:
            self._warm_up_left -= 1
            yield
        elif len(self._timed) < self._num_steps:
            self._clock = self._clock or InstructionClock(self._engine)
            self._schedule = self._engine.schedule_name
            with self._clock.step():
                yield
            self._timed.append(number)
        else:
            self._start_trace()
            with InstructionClock(self._engine):  # for the ranges of the instructions; its figures are left
                yield
            if self._is_tracing:
                self._traced.append(number)
            if len(self._traced) == self._num_steps:
                self.interrupt()

    @property
    def is_due(self) -> bool:
        """Whether all that was asked for is there and waits to be written."""
        return self._is_over and bool(self._timed)

    def interrupt(self) -> None:
        """End the trace: an evaluation or a checkpoint, which is no training step, would fill it."""
        if self._is_tracing:
            self._is_tracing = False
            # PyTorch's profiler follows each message to its end. One that ends behind the trace, as those that are
            # under way between two steps would, is written into memory that is no more: the process may crash.
            self._engine.settle()
            self._trace.stop()
            self._is_over = True

    def finish(self) -> None:
        """Profile no further step."""
        self.interrupt()
        self._is_over = True

    def write(self) -> None:
        """Write what there is, once; what cannot be written is said in `problems` and ends nothing."""
        if not self._timed:
            return
        rank = int(self._engine.global_rank)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / trace_file(rank)).unlink(missing_ok=True)  # of the run before it was resumed
            if self._traced:
                self._trace.export_chrome_trace(str(self.folder / trace_file(rank)))
            _write_json(self.folder / terms_file(rank), self._document())
        except (OSError, RuntimeError) as error:  # PyTorch says of a full disk that it is a RuntimeError
            self.problems.append(f"the profile in {self.folder} cannot be written: {error}")
        self._timed, self._traced, self._trace, self._is_over = [], [], None, True

    def describe(self) -> str:
        """What was profiled, in words, before it is written."""
        traced = f", {_range(self._traced)} traced" if self._traced else ""
        return f"{_range(self._timed)} timed{traced}"

    def _start_trace(self) -> None:
        if self._is_tracing or self._is_over:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.device(self._engine.device).type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says at length that there is no GPU
        self._trace = torch.profiler.profile(activities=activities)
        try:
            self._trace.start()
        except RuntimeError as error:  # another profiler runs in this process
            self.problems.append(f"PyTorch's profiler does not start, so there is no trace: {error}")
            self._is_over = True
            return
        self._is_tracing = True

    def _document(self) -> dict[str, Any]:
        engine, clock, steps = self._engine, self._clock, len(self._timed)
        assert clock is not None, "steps were timed"
        terms = {name: seconds / steps for name, seconds in clock.terms().items()}
        step_s = clock.step_seconds / steps
        # What the engine does between its instructions is no instruction's: so the terms add up to the step.
        terms[OTHER] += max(0.0, step_s - sum(terms.values()))
        rank = int(engine.global_rank)
        return {
            "format": FORMAT,
            "rank": rank,
            "world_size": int(engine.grid.world_size),
            "stage": int(engine.stage_id),
            "stages": int(engine.num_stages),
            "replica": int(engine.grid.get_data_parallel_rank()),
            "replicas": int(engine.dp_world_size),
            "schedule": self._schedule,
            "micro_batches": int(engine.micro_batches),
            "device": str(engine.device),
            "timed_steps": self._timed,
            "seconds_per_step": step_s,
            "terms": terms,
            "instructions": {
                name: {"seconds_per_step": seconds / steps, "calls_per_step": clock.calls[name] / steps}
                for name, seconds in sorted(clock.seconds.items())
            },
            "traced_steps": self._traced,
            "trace": trace_file(rank) if self._traced else None,
            "environment": describe_environment(world_size=int(engine.grid.world_size)),
        }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a file that is whole whenever it is there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _range(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"steps {steps[0]}-{steps[-1]}" if steps[-1] - steps[0] == len(steps) - 1 else f"{len(steps)} steps"
