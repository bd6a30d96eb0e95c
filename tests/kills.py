"""Kill a random rank at random moments of a run, resume it each time, and compare the end with an undisturbed run.

    python -m tests.kills --kills 50 --schedule al

A kill is survived if all other ranks end by themselves, the next start goes on from the newest checkpoint that the run
had announced, and the run ends with the same weights and optimizer state, to the bit, as one that nobody disturbed.
Moments are drawn from three kinds: at any time since the start, while it trains, and while it saves.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dsaux.checkpoint import find_checkpoint
from tests.launch.small import write_config
from tests.launch.start import Ranks, events, start_ranks

KINDS = ("any time", "training", "saving")
ANY_TIME_S = 12.0
TRAINING_S = 2.0
SAVING_S = 0.08
ENDING_S = 150.0
"""How long the other ranks may take: a start that one rank never joins has the timeout of the process group, 60 s."""


@dataclass(frozen=True)
class Plan:
    """A short run with many checkpoints.

    Attributes:
        schedule: penalty, al, local or 1f1b.
        world_size: processes.
        epochs: of 8 steps each.
        checkpoint_every: steps between checkpoints.
    """

    schedule: str
    world_size: int = 2
    epochs: int = 100
    checkpoint_every: int = 5


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it.

    Attributes:
        kind: a name in `KINDS`.
        rank: which one.
        step: newest step that the run had logged.
        ended_s: seconds until all other ranks had ended.
        codes: exit codes by rank.
        problem: why the kill was not survived; empty if it was.
    """

    kind: str
    rank: int
    step: int
    ended_s: float
    codes: tuple[int, ...]
    problem: str = ""


def main() -> int:
    """Run it; 1 if a kill was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (50)")
    parser.add_argument(
        "--schedule", choices=("penalty", "al", "local", "1f1b"), default="al", help="schedule of the run (al)"
    )
    parser.add_argument("--stages", type=int, default=2, help="processes, one a stage (2)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and ranks (0)")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="dsaux-kills-") as folder:
        plan = Plan(arguments.schedule, arguments.stages)
        kills, ends = disturb(plan, count=arguments.kills, seed=arguments.seed, folder=Path(folder), console=console)
    show(kills, ends, console)
    lost = sum(bool(kill.problem) for kill in kills) + sum(end != "" for end in ends)
    console.print(f"survived {len(kills) - sum(bool(kill.problem) for kill in kills)}, lost {lost}")
    return 1 if lost else 0


def disturb(
    plan: Plan, *, count: int, seed: int, folder: Path, console: Console | None = None, kinds: tuple[str, ...] = KINDS
) -> tuple[list[Kill], list[str]]:
    """Kill `count` times.

    Args:
        plan: the run.
        count: kills.
        seed: of moments and ranks.
        folder: where runs and logs go.
        console: is told of each kill.
        kinds: moments to draw from.

    Returns:
        The kills, and for each run that came to its end what differs from the undisturbed run ("" for nothing).
    """
    draw = random.Random(seed)
    config = write_config(
        folder / "config.json",
        model={"name": "resnet8"},
        pipeline={"schedule": plan.schedule, "stages": plan.world_size, "partition": list(range(1, plan.world_size))},
        run={
            "epochs": plan.epochs,
            "eval_every": 0,
            "log_every": 1,
            "checkpoint_every": plan.checkpoint_every,
            "timeout_s": 60,
        },
    )
    undisturbed = folder / "undisturbed"
    ranks = _start(config, undisturbed, plan, folder / "logs" / "undisturbed")
    if any(ranks.wait()):
        raise RuntimeError(f"the undisturbed run failed:\n{ranks.text()}")
    last_step = find_checkpoint(undisturbed).step
    kills: list[Kill] = []
    ends: list[str] = []
    while len(kills) < count or not ends:
        run_dir = folder / f"run{len(ends)}"
        while True:
            ranks = _start(config, run_dir, plan, folder / "logs" / f"{len(kills)}-{len(ends)}-{time.monotonic_ns()}")
            kill = _kill_once(ranks, run_dir, draw, kinds, last_step=last_step) if len(kills) < count else None
            if kill is None:
                break
            kills.append(kill)
            if console:
                state = kill.problem or "survived"
                console.print(f"kill {len(kills):3d}  rank {kill.rank}  {kill.kind:9s}  step {kill.step:4d}  {state}")
        codes = ranks.wait()
        ends.append(_differences(undisturbed, run_dir) if not any(codes) else f"exit codes {codes}:\n{ranks.text()}")
    return kills, ends


def show(kills: list[Kill], ends: list[str], console: Console) -> None:
    """A table of the kinds, and how the runs ended."""
    table = Table(
        "moment", "kills", "survived", "others ended after, median s", "longest s", "exit codes of the others"
    )
    for kind in KINDS:
        own = [kill for kill in kills if kill.kind == kind]
        if own:
            waits = sorted(kill.ended_s for kill in own)
            codes = Counter(code for kill in own for rank, code in enumerate(kill.codes) if rank != kill.rank)
            table.add_row(
                kind,
                str(len(own)),
                str(sum(not kill.problem for kill in own)),
                f"{waits[len(waits) // 2]:.1f}",
                f"{waits[-1]:.1f}",
                ", ".join(f"{code}: {number}" for code, number in sorted(codes.items())),
            )
    console.print(table)
    for end in ends:
        console.print(end or "a run came to its end with the bits of the undisturbed run")


def _start(config: Path, run_dir: Path, plan: Plan, logs: Path) -> Ranks:
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir), "--resume", "latest"]
    return start_ranks(arguments, world_size=plan.world_size, folder=logs)


def _kill_once(
    ranks: Ranks, run_dir: Path, draw: random.Random, kinds: tuple[str, ...], *, last_step: int
) -> Kill | None:
    """Kill one rank at a moment of its own; None if the run had ended before."""
    kind, rank = draw.choice(kinds), draw.randrange(len(ranks.processes))
    announced = _announced(run_dir)
    begun = len(events(run_dir, "step"))
    if kind == "any time":
        _sleep(ranks, draw.uniform(0, ANY_TIME_S))
    else:
        while ranks.is_running() and len(events(run_dir, "step")) == begun:
            time.sleep(0.01)
        _sleep(ranks, draw.uniform(0, TRAINING_S))
        while kind == "saving" and ranks.is_running() and not list(run_dir.glob("checkpoint/.*.partial")):
            time.sleep(0.001)
        if kind == "saving":
            time.sleep(draw.uniform(0, SAVING_S))
    if not ranks.is_running():
        return None
    ranks.processes[rank].kill()
    started = time.monotonic()
    problem = ""
    try:
        codes = ranks.wait(limit_s=ENDING_S)
    except AssertionError as error:
        codes, problem = [process.returncode for process in ranks.processes], str(error)
    # Rank 0 leaves last: killed behind the end of the run, it takes nobody along.
    if not problem and 0 in codes and find_checkpoint(run_dir).step < last_step:
        problem = f"a rank ended with 0 although rank {rank} was killed"
    resumed = [event["step"] for event in events(run_dir, "resumed")]
    if (
        not problem
        and announced is not None
        and len(events(run_dir, "step")) > begun
        and (resumed or [0])[-1] < announced
    ):
        problem = f"went on from step {(resumed or [0])[-1]} although step {announced} was saved"
    step = max((event["step"] for event in events(run_dir, "step")), default=0)
    return Kill(kind, rank, step, time.monotonic() - started, tuple(codes), problem)


def _announced(run_dir: Path) -> int | None:
    """Newest step whose checkpoint the run has announced."""
    return max((event["step"] for event in events(run_dir, "checkpoint")), default=None)


def _sleep(ranks: Ranks, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and ranks.is_running():
        time.sleep(0.01)


def _differences(one: Path, other: Path) -> str:
    """The first tensor of layers, AuxNet and optimizers that differs between two runs' ends; "" for none."""
    first, second = find_checkpoint(one), find_checkpoint(other)
    if first.step != second.step:
        return f"ended at step {second.step}, not at {first.step}"
    for name in first.files:
        if name.startswith(("layer_", "aux_net", "head_")) and not _same(first.load(name), second.load(name)):
            return f"{name} differs from the undisturbed run's"
    return ""


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return one == other


if __name__ == "__main__":
    sys.exit(main())
