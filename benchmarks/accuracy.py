"""The suite "accuracy": test accuracy over wall time, each run a launch of train.py as a user's, three seeds.

All runs have the same data stream, global batch, number of steps and learning-rate schedule; the configuration is that
of the quick start. `ddp` is the configuration with one stage and as many replicas as processes, that is DeepSpeed's
data parallelism, which averages the same gradients.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seeds import run

from dsaux.runtime import cores_of_a_process

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "ds_configs/quickstart.json"
GLOBAL_BATCH = 128
RANKS = 2
SEEDS = (0, 1, 2)
TARGET = 0.8
"""Test accuracy whose time is taken."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Who trains.

    Attributes:
        contestant: name in the results.
        stages: stages K; the other processes are replicas.
        ranks: processes.
        micro_batches: micro-batches in a step.
        schedule: `dsaux.pipeline.schedule`.
    """

    contestant: str
    stages: int
    ranks: int
    micro_batches: int
    schedule: str

    def overrides(self, *, seed: int, epochs: int | None) -> list[str]:
        """For `--set` of train.py."""
        values = {
            "dsaux.run.seed": seed,
            "dsaux.run.eval_every": 1,
            "dsaux.run.checkpoint_every": 0,
            "dsaux.pipeline.stages": self.stages,
            "dsaux.pipeline.schedule": self.schedule,
            "train_batch_size": GLOBAL_BATCH,
            "gradient_accumulation_steps": self.micro_batches,
        }
        if epochs is not None:
            values["dsaux.run.epochs"] = epochs
        return [f"{key}={value}" for key, value in values.items()]


CANDIDATES = (
    Candidate("one-process", 1, 1, 4, "1f1b"),
    Candidate("ddp", 1, RANKS, 2, "1f1b"),
    Candidate("deepspeed-1f1b", RANKS, RANKS, 4, "1f1b"),
    Candidate("dsaux-penalty", RANKS, RANKS, 2, "penalty"),
    Candidate("dsaux-al", RANKS, RANKS, 2, "al"),
    Candidate("dsaux-local", RANKS, RANKS, 2, "local"),
)
"""The exact ones at the micro-batch count at which they are fastest in the suite "compute", or next to it."""


def measure(*, quick: bool) -> Iterator[tuple[Row, Row]]:
    """Train all candidates; seeds outside, candidates inside, so that a slow hour meets all of them.

    Args:
        quick: one seed, one epoch.

    Yields:
        For each run its row as of `seeds.run` and the line of results of its candidate so far.
    """
    runs: dict[Candidate, list[Row]] = {candidate: [] for candidate in CANDIDATES}
    for seed in SEEDS[:1] if quick else SEEDS:
        for candidate in CANDIDATES:
            overrides = candidate.overrides(seed=seed, epochs=1 if quick else None)
            row = run(CONFIG, num_processes=candidate.ranks, overrides=overrides, suite="accuracy")
            if not row["failed"]:
                runs[candidate].append(row)
            yield row, line_of(candidate, runs[candidate], failed=row["error"])


def line_of(candidate: Candidate, rows: Sequence[Row], *, failed: str | None) -> Row:
    """One line of results.

    Args:
        candidate: who trained.
        rows: its runs, one for each seed.
        failed: error of the last run, if it failed.
    """
    about = {
        "suite": "accuracy",
        "case": CONFIG.stem,
        "contestant": candidate.contestant,
        "stages": candidate.stages,
        "ranks": candidate.ranks,
        "micro_batches": candidate.micro_batches,
        "threads": threads_of_a_rank(candidate.ranks),
        "link_mbit": None,
        "failed": failed,
    }
    if not rows:
        return about
    finals = [row["final"] for row in rows]
    speeds = [final["train_samples_per_s"] for final in finals]
    waits = [statistics.mean(final["wait_share"]) for final in finals if final["wait_share"]]
    return {
        **about,
        "samples_per_s": round(statistics.median(speeds), 2),
        "spread": [round(min(speeds), 2), round(max(speeds), 2)],
        "global_batch": GLOBAL_BATCH,
        "idle_share": None,  # a launch as a user's: what the exact engines wait for is not known
        "bytes_per_step": None,
        "wait_share": round(statistics.median(waits), 4) if waits else None,
        "peak_memory_bytes": max(max(final["peak_memory_bytes"]) for final in finals),
        "n": len(rows),
        "seeds": [final["seed"] for final in finals],
        "test_accuracy": [final["test_accuracy"] for final in finals],
        "target": TARGET,
        "seconds_to_target": [seconds_to(TARGET, row) for row in rows],
        "curves": [
            [[seconds, top1] for seconds, (_, top1) in zip(row["eval_s"], row["evals"], strict=True)] for row in rows
        ],
        "environment": rows[-1]["environment"],
    }


def threads_of_a_rank(ranks: int) -> int:
    """PyTorch's threads in each process of a launch, as `dsaux.runtime.share_cores` deals them out."""
    given = os.environ.get("OMP_NUM_THREADS")
    return int(given) if given else cores_of_a_process(ranks)


def seconds_to(target: float, row: Row) -> float | None:
    """Seconds of training until the first evaluation that reaches an accuracy; None where none does."""
    for seconds, (_, top1) in zip(row["eval_s"], row["evals"], strict=True):
        if top1 >= target:
            return float(seconds)
    return None
