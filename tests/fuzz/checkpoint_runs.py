"""Goes on from damaged run folders with the real train.py, and judges how that ended."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.checkpoints import EXECUTED, STEPS, Damage, copy_of, damage
from tests.fuzz.runs import CONFIG, RUN, STDERR, STDOUT, TIME_LIMIT_S, Outcome, end_with_children, read_events, train
from tests.fuzz.verdict import ERROR, LONGEST_ERROR, MENDS, Verdict
from tests.launch.small import write_config
from tests.ranks import PRELOADED

CLEAR_FAILURE = re.compile(r"the (test )?loss.* (in|behind) step \d+.*\. Lower .*")
"""A forged checkpoint may hold weights that are no numbers."""


@dataclass(frozen=True)
class Base:
    """The run whose copies are damaged: 12 steps of 6 an epoch, with its checkpoints of `STEPS`."""

    run_dir: Path

    @classmethod
    def train(cls, folder: Path) -> Base:
        """Train it, in a folder that is made for it.

        Raises:
            RuntimeError: if it fails.
        """
        folder.mkdir()
        write_config(
            folder / CONFIG,
            data={"train_samples": 6 * 64},
            pipeline={"stages": 1, "partition": "uniform"},
            run={"epochs": 2, "eval_every": 0, "checkpoint_every": STEPS[0], "keep": len(STEPS), "bn_batches": 1},
        )
        outcome = _run(folder, ["--ds_config", CONFIG, "--run_dir", RUN])
        found = sorted(path.name for path in (folder / RUN / "checkpoint").glob("step_*"))
        if outcome.code != 0 or len(found) != len(STEPS):
            raise RuntimeError(f"the base run failed with {outcome.code}, checkpoints {found}:\n{outcome.stderr}")
        return cls(folder / RUN)


def try_damage(base: Base, folder: Path, *, seed: int, number: int) -> tuple[Damage, Outcome, Verdict]:
    """Damage a copy of the base run, go on from it for an epoch, and judge; the folder is removed."""
    folder.mkdir()
    try:
        done = damage(copy_of(base.run_dir, folder / RUN), seed=seed, number=number)
        outcome = _run(folder, ["--resume", RUN, "--set", "dsaux.run.epochs=3"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    reasons = list(_defects(done, outcome))
    kind = {0: "went on", 2: "refused"}.get(outcome.code or 0, "failed clearly")
    return done, outcome, Verdict("DEFECT", "; ".join(reasons)) if reasons else Verdict(kind)


def _run(folder: Path, arguments: list[str]) -> Outcome:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = time.monotonic()
    process = context.Process(target=train, args=(str(folder), tuple(arguments), TIME_LIMIT_S))
    process.start()
    process.join(TIME_LIMIT_S)
    code = process.exitcode
    if code is None:
        end_with_children(process.pid)
        process.join()
    process.close()
    stdout, stderr = ((folder / name).read_text("utf-8", "replace") for name in (STDOUT, STDERR))
    events = list(read_events(folder / RUN / "metrics.jsonl"))
    return Outcome(code=code, stdout=stdout, stderr=stderr, events=events, seconds=time.monotonic() - started)


def _defects(done: Damage, outcome: Outcome) -> Iterator[str]:
    output = outcome.stdout + outcome.stderr
    resumed = [event["step"] for event in outcome.events if event["event"] == "resumed"]
    if EXECUTED in output:
        yield "code out of a checkpoint was executed"
    if outcome.code is None:
        yield "it hangs"
    elif outcome.code == 0:
        if done.expects is None:
            yield "it went on from a damaged checkpoint"
        elif done.expects >= 0 and resumed != [done.expects]:
            yield f"it went on from step {resumed}, not {done.expects}"
        if "Traceback" in output:
            yield "it went on with a traceback"
        if outcome.events[-1]["event"] != "final":
            yield "it did not come to its end"
    elif outcome.code in (1, 2):
        if done.expects is not None and done.expects >= 0:
            yield f"it did not go on from step {done.expects}"
        yield from _defects_of_an_error(outcome)
    else:
        yield f"exit code {outcome.code}"


def _defects_of_an_error(outcome: Outcome) -> Iterator[str]:
    lines = [line for line in outcome.stderr.splitlines() if "No CUDA runtime" not in line]
    found = ERROR.fullmatch(lines[-1]) if lines else None
    if found is None:
        yield "its last line is no error of ours"
        return
    if outcome.code == 1 and not CLEAR_FAILURE.fullmatch(found[1]):
        yield "it failed without a clear error"
    if outcome.code == 2:
        if len(lines) != 1:
            yield f"it was refused with {len(lines)} lines"
        if not MENDS.search(found[1]):
            yield "its error has no mend"
        if len(found[1]) > 3 * LONGEST_ERROR:  # a sentence for each of three checkpoints
            yield f"its error has {len(found[1])} characters"
