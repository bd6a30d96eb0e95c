"""Trains with a mutated configuration; `tests.fuzz.verdict` judges how that ended.

Each run is the real train.py in a process of its own, forked from a server that has imported PyTorch and DeepSpeed
once. It has the time limit of a hang and a limit of memory, so that no value can take the machine along.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.configs import ROOT, Mutant
from tests.ranks import PRELOADED

TIME_LIMIT_S = 90.0
BUILD_LIMIT_S = 400.0
"""For a run in which a compiler may run."""
MEMORY_BYTES = 8 * 2**30
CONFIG, RUN, STDOUT, STDERR = "config.json", "run", "stdout", "stderr"

LAUNCHERS = re.compile(r"RANK|WORLD_SIZE|LOCAL_.*|MASTER_.*|SLURM_.*|OMPI_.*|PMI_.*|TORCHELASTIC_.*")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code, below 0 for a signal; None if it was ended at the time limit.
        stdout: what it printed.
        stderr: its errors.
        events: lines of its metrics.jsonl.
        seconds: how long it took.
    """

    code: int | None
    stdout: str
    stderr: str
    events: list[dict[str, Any]]
    seconds: float


def run(mutant: Mutant, folder: Path) -> Outcome:
    """Trains with a mutant in a folder that is made for it, and removed."""
    folder.mkdir()
    try:
        return _run(mutant, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(mutant: Mutant, folder: Path) -> Outcome:
    (folder / CONFIG).write_bytes(mutant.content)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    limit_s = BUILD_LIMIT_S if mutant.builds_an_operation else TIME_LIMIT_S
    started = time.monotonic()
    settings = [word for override in mutant.overrides for word in ("--set", override)]
    arguments = ("--ds_config", CONFIG, "--run_dir", RUN, *settings)
    process = context.Process(target=train, args=(str(folder), arguments, limit_s))
    process.start()
    process.join(limit_s)
    code = process.exitcode
    if code is None:
        end_with_children(process.pid)
        process.join()
    outcome = Outcome(
        code=code,
        stdout=(folder / STDOUT).read_text("utf-8", "replace"),
        stderr=(folder / STDERR).read_text("utf-8", "replace"),
        events=list(read_events(folder / RUN / "metrics.jsonl")),
        seconds=time.monotonic() - started,
    )
    process.close()
    return outcome


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics.jsonl; none where there is no file."""
    if path.is_file():
        yield from (json.loads(line) for line in path.read_text("utf-8").splitlines())


def end_with_children(pid: int | None) -> None:
    """End a run and the processes that it has started."""
    assert pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # the run leads a session of its own


def train(folder: str, arguments: tuple[str, ...], limit_s: float, launcher: Mapping[str, str] | None = None) -> None:
    """The run, in its own process: train.py as a user starts it without a launcher, or one rank of it.

    Args:
        folder: where it runs, and where its output goes.
        arguments: of train.py.
        limit_s: where it stands is printed two seconds before.
        launcher: what a launcher would set for this rank; None for a start without one.
    """
    os.setsid()
    os.chdir(folder)
    for descriptor, name in ((1, STDOUT), (2, STDERR)):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), descriptor)
    faulthandler.dump_traceback_later(limit_s - 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in list(os.environ):
        if LAUNCHERS.fullmatch(name):
            del os.environ[name]
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(launcher or {})})
    # The torch loader's workers come from a server of this run's own, as in real life, and end with it.
    multiprocessing.forkserver._forkserver = multiprocessing.forkserver.ForkServer()
    sys.path.insert(0, str(ROOT))
    sys.argv = ["train.py", *arguments]
    import torch

    import train as script
    from dsaux.runtime import run_and_exit

    torch.set_num_threads(1)
    run_and_exit(script.main)  # ends this process, forked as it is
