"""The loss of a run's first step, under any launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.launch.small import write_config
from tests.launch.start import ROOT, TIME_LIMIT_S, events

PYTHON = [sys.executable, "-u"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def start(
    command: Sequence[str], *arguments: str, base: Mapping[str, str] = os.environ, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run train.py on CPUs under a launcher, to its end; standard output has errors as well.

    Args:
        command: the launcher's, without train.py.
        arguments: of train.py.
        base: environment.
        variables: further environment variables.
    """
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        env={**base, **own, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT_S,
    )


def first_loss(command: Sequence[str], folder: Path, *, stages: int, base: Mapping[str, str] = os.environ) -> float:
    """Loss of the first step, one stage a process.

    Args:
        command: of a launcher that starts `stages` processes.
        folder: for the run.
        stages: K.
        base: environment.
    """
    # Exact back-propagation: the loss of the whole network, however many stages it is cut into.
    pipeline = {"stages": stages, "partition": "uniform", "schedule": "1f1b"}
    run = {"epochs": 1, "max_steps": 2, "bn_batches": 1}
    config = write_config(folder / "small.json", pipeline=pipeline, run=run)
    options = ["--set", "scheduler.params.warmup_num_steps=2", "--run_dir", str(folder / "run")]
    done = start(command, "--ds_config", str(config), *options, base=base)
    assert done.returncode == 0, done.stdout
    rows = events(folder / "run", "stages")[0]["rows"]
    assert [(row["rank"], row["stage"]) for row in rows] == [(rank, rank) for rank in range(stages)]
    return float(events(folder / "run", "step")[0]["loss"])
