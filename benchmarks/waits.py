"""How busy are the ranks? Stages that sleep instead of computing, on the real engine, several schedules in one run.

    python benchmarks/waits.py --stages 4 --micro_batches 1 --schedules al al-overlap penalty 1f1b

A stage sleeps a set time in its forward and its backward pass and computes next to nothing, so ranks need no cores of
their own; the AuxNet, the messages and the optimizers are real. The schedules take turns in blocks: a slow minute of
the machine meets all of them. A block is measured from barrier to barrier behind a warm-up that also fills the
wavefront of `al`; it is drained after the second barrier.

Busy is the time that a rank sleeps in its stage (as slept, not as asked for) or computes in its AuxNet; all else, waits
and the engine's own work alike, counts as idle. Lines go to benchmarks/results/waits.jsonl; `benchmarks/report.py`
makes the README's table of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from seeds import append_line
from sleepers import Sleeper, SleepingLayer
from torch import nn

from dsaux.environment import describe_environment
from dsaux.rendezvous import free_port

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "al": ("al", {}),
    "al-overlap": ("al", {"overlap": True}),
    "penalty": ("penalty", {}),
    "1f1b": ("1f1b", {}),
}
"""Contestants: `dsaux.pipeline.schedule` and further keys of `dsaux.aux`."""
IMAGE_SHAPE, CHANNELS, NUM_CLASSES, SAMPLES = (3, 8, 8), 4, 5, 4
"""Small, so that the machine's cores have little to do; samples of a micro-batch."""
TIMEOUT_S = 300

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        schedules: names in `SCHEDULES`.
        stages: stages K, one rank each.
        micro_batches: micro-batches M in a step.
        forward_ms: sleep of a stage in the forward passes of a step; a micro-batch has the M-th part.
        backward_ms: likewise in the backward passes.
        jitter: share by which each sleep varies, uniformly up and down.
        steps: measured steps in a block.
        blocks: measured blocks of each schedule.
        warmup: unmeasured steps at the start of a block, the fill of a wavefront not counted.
        seed: of the jitter; all schedules draw the same sleeps.
    """

    schedules: tuple[str, ...]
    stages: int = 4
    micro_batches: int = 1
    forward_ms: float = 40.0
    backward_ms: float = 80.0
    jitter: float = 0.0
    steps: int = 20
    blocks: int = 5
    warmup: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Window:
    """What one rank did in one measured block, in seconds.

    Attributes:
        window_s: from barrier to barrier.
        stage_s: slept in the stage.
        aux_s: forward, backward and optimizer step of the AuxNet.
        waited_s: lost in waits, by dsaux's own meter; it does not see 1f1b's.
    """

    window_s: float
    stage_s: float
    aux_s: float
    waited_s: float


def main() -> int:
    """Measure, print, append the lines; 1 if a rank failed."""
    plan, out = parse_arguments()
    try:
        rows = run_ranks(plan)
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        print(f"a rank failed, the others were ended:\n{error}", file=sys.stderr)
        return 1
    for row in rows:
        append_line(out, row)
    Console(width=None if sys.stdout.isatty() else 150).print(rich_table(rows))
    return 0


def parse_arguments() -> tuple[Plan, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="contestants (all)")
    parser.add_argument("--stages", type=int, default=Plan.stages, help="stages, one process each (4)")
    parser.add_argument("--micro_batches", type=int, default=Plan.micro_batches, help="micro-batches in a step (1)")
    parser.add_argument("--forward_ms", type=float, default=Plan.forward_ms, help="a stage's forward sleep a step (40)")
    parser.add_argument("--backward_ms", type=float, default=Plan.backward_ms, help="its backward sleep (80)")
    parser.add_argument("--jitter", type=float, default=Plan.jitter, help="share by which each sleep varies (0)")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="measured steps in a block (20)")
    parser.add_argument("--blocks", type=int, default=Plan.blocks, help="measured blocks of each schedule (5)")
    parser.add_argument("--warmup", type=int, default=Plan.warmup, help="unmeasured steps of a block (2)")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="seed of the jitter (0)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/waits.jsonl", help="file to append to")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    plan = Plan(**{**arguments, "schedules": tuple(arguments["schedules"])})
    for name, least in (("stages", 2), ("micro_batches", 1), ("steps", 1), ("blocks", 1), ("warmup", 0)):
        if getattr(plan, name) < least:
            parser.error(f"--{name} is {getattr(plan, name)}; it must be {least} or more.")
    if not 0 <= plan.jitter < 1 or plan.forward_ms <= 0 or plan.backward_ms <= 0:
        parser.error("--jitter must be in [0, 1), --forward_ms and --backward_ms above 0.")
    return plan, out


# ---- the figures ----------------------------------------------------------------------------------------------------


def theory_busy(schedule: str, *, stages: int, micro_batches: int) -> float:
    """Busy share of equal stages with free transfers: M / (M + K - 1) under 1F1B, always without pipeline."""
    return micro_batches / (micro_batches + stages - 1) if schedule == "1f1b" else 1.0


def summary(plan: Plan, *, schedule: str, blocks: Sequence[Sequence[Window]], environment: Row) -> Row:
    """One line of results.

    Args:
        plan: what was measured.
        schedule: a name in `SCHEDULES`.
        blocks: for each block the windows of all ranks, in rank order.
        environment: of this run.
    """
    step_s = [statistics.mean(window.window_s for window in block) / plan.steps for block in blocks]
    by_rank = list(zip(*blocks, strict=True))
    busy = [[(window.stage_s + window.aux_s) / window.window_s for window in windows] for windows in by_rank]
    parts = {
        part: [
            statistics.median(getattr(window, f"{part}_s") / window.window_s for window in windows)
            for windows in by_rank
        ]
        for part in ("stage", "aux", "waited")
    }
    settings = {key: value for key, value in asdict(plan).items() if key != "schedules"}
    return {
        **settings,
        "schedule": schedule,
        "n": len(blocks),
        "busy": [middle_and_range(shares) for shares in busy],
        "stage_share": _rounded(parts["stage"]),
        "aux_share": _rounded(parts["aux"]),
        "wait_share": [] if schedule == "1f1b" else _rounded(parts["waited"]),
        "step_s": middle_and_range(step_s),
        "theory_busy": theory_busy(schedule, stages=plan.stages, micro_batches=plan.micro_batches),
        "environment": {key: value for key, value in environment.items() if key not in ("command", "host")},
    }


def middle_and_range(values: Sequence[float]) -> list[float]:
    """Median, smallest and largest value."""
    return _rounded([statistics.median(values), min(values), max(values)])


def rich_table(rows: Sequence[Row]) -> Table:
    """The lines of one run for a terminal."""
    first = rows[0]
    table = Table(
        title=f"{first['stages']} stages, {first['micro_batches']} micro-batches, sleeps of {first['forward_ms']:g} + "
        f"{first['backward_ms']:g} ms, jitter {first['jitter']:g}; {first['n']} blocks of {first['steps']} steps"
    )
    heads = ("busy per rank, median", "lowest to highest", "AuxNet", "waits", "step", "busy in theory")
    table.add_column("schedule")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        low, high = min(rank[1] for rank in row["busy"]), max(rank[2] for rank in row["busy"])
        middle, least, most = (1000 * value for value in row["step_s"])
        table.add_row(
            row["schedule"],
            _per_cents(rank[0] for rank in row["busy"]),
            f"{100 * low:.1f} to {100 * high:.1f} %",
            _per_cents(row["aux_share"]) if any(row["aux_share"]) else "-",
            _per_cents(row["wait_share"]) if row["wait_share"] else "-",
            f"{middle:.0f} ms ({least:.0f} to {most:.0f})",
            f"{100 * row['theory_busy']:.1f} %",
        )
    return table


def _per_cents(shares: Any) -> str:
    return " ".join(f"{100 * share:.1f}" for share in shares) + " %"


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]


# ---- stages that sleep ----------------------------------------------------------------------------------------------


class AuxClock:
    """Counts the time of an engine's AuxNet: forward, backward, optimizer step, but not the wait for its sum.

    It takes the place of the engine's own timers, which `wall_clock_breakdown` would switch on together with
    DeepSpeed's.

    Args:
        engine: an `AuxPipelineEngine`.
        names: names of the timers that count.
    """

    def __init__(self, engine: Any, names: Sequence[str]) -> None:
        self.names, self.spent_s, self._started = frozenset(names), 0.0, 0.0
        engine._start_timer, engine._stop_timer = self._start, self._stop

    def _start(self, _name: str) -> None:
        self._started = time.perf_counter()

    def _stop(self, name: str) -> None:
        if name in self.names:
            self.spent_s += time.perf_counter() - self._started


def _bodies(stages: int) -> list[nn.Module]:
    first = nn.Conv2d(IMAGE_SHAPE[0], CHANNELS, 1)
    middle = [nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(stages - 2)]
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, NUM_CLASSES))
    return [first, *middle, last]


# ---- the ranks ------------------------------------------------------------------------------------------------------


def run_ranks(plan: Plan) -> list[Row]:
    """Start a gloo rank for each stage, measure, return a line for each schedule.

    Raises:
        torch.multiprocessing.ProcessRaisedException: if a rank failed; the others have been ended then.
        torch.multiprocessing.ProcessExitedException: likewise, for one that died without a word.
    """
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # before the fork server starts: it imports DeepSpeed
    multiprocessing.set_forkserver_preload(["torch", "deepspeed", "dsaux.engine", "dsaux.bootstrap"])
    with tempfile.TemporaryDirectory(prefix="dsaux-") as folder:
        path = Path(folder) / "rows.json"
        torch.multiprocessing.start_processes(
            _rank_main, args=(plan, free_port(), path), nprocs=plan.stages, daemon=True, start_method="forkserver"
        )
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        return rows


def _rank_main(rank: int, plan: Plan, port: int, path: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": plan.stages, "LOCAL_WORLD_SIZE": plan.stages}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from dsaux.runtime import start_process_group

    torch.set_num_threads(1)
    start_process_group(timeout_s=TIMEOUT_S)
    part = 1000.0 * plan.micro_batches * SAMPLES  # a sleeper sleeps by the sample
    sleeper = Sleeper(forward_s=plan.forward_ms / part, backward_s=plan.backward_ms / part, jitter=plan.jitter)
    blocks: dict[str, list[list[Window]]] = {name: [] for name in plan.schedules}
    with contextlib.redirect_stdout(io.StringIO()):  # libraries that print
        engines = {name: build_engine(plan, name, sleeper=sleeper) for name in plan.schedules}
        for block in range(-1, plan.blocks):  # block -1 warms up
            turn = max(block, 0) % len(plan.schedules)
            for name in plan.schedules[turn:] + plan.schedules[:turn]:
                sleeper.seed(f"{plan.seed}/{block}/{rank}")
                window = measure_block(*engines[name], plan=plan, sleeper=sleeper)
                windows: list[Any] = [None] * plan.stages
                torch.distributed.all_gather_object(windows, window)
                if block >= 0:
                    blocks[name].append(windows)
    if rank == 0:
        environment = describe_environment(world_size=plan.stages)
        rows = [summary(plan, schedule=name, blocks=blocks[name], environment=environment) for name in plan.schedules]
        path.write_text(json.dumps(rows), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def build_engine(plan: Plan, name: str, *, sleeper: Sleeper) -> tuple[Any, AuxClock]:
    """This rank's engine for one contestant, and the clock of its AuxNet.

    Args:
        plan: what is measured.
        name: a name in `SCHEDULES`.
        sleeper: sleeps for this rank's stage.
    """
    from dsaux.assemble import cross_entropy
    from dsaux.bootstrap import initialize
    from dsaux.local_step import AUX_BACKWARD_TIMER, AUX_FORWARD_TIMER, AUX_STEP_TIMER
    from dsaux.models.auxnet import build_aux_net
    from dsaux.module import AuxPipelineModule

    schedule, aux = SCHEDULES[name]
    shapes = [IMAGE_SHAPE, *[(CHANNELS, *IMAGE_SHAPE[1:])] * (plan.stages - 1)]
    torch.manual_seed(plan.seed)
    module = AuxPipelineModule(
        [SleepingLayer(body, sleeper) for body in _bodies(plan.stages)],
        num_stages=plan.stages,
        bounds=range(plan.stages + 1),
        loss_fn=cross_entropy,
        aux_net=None if schedule == "1f1b" else build_aux_net(shapes),
    )
    document = {
        "train_batch_size": SAMPLES * plan.micro_batches,
        "gradient_accumulation_steps": plan.micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        "steps_per_print": 10**9,
        "dsaux": {
            "pipeline": {"stages": plan.stages, "schedule": schedule},
            "data": {"loader": "torch"},
            "aux": aux,
            "run": {"timeout_s": TIMEOUT_S},
        },
    }
    engine, _, _, _ = initialize(model=module, config=document)
    return engine, AuxClock(engine, (AUX_FORWARD_TIMER, AUX_BACKWARD_TIMER, AUX_STEP_TIMER))


def measure_block(engine: Any, clock: AuxClock, *, plan: Plan, sleeper: Sleeper) -> Window:
    """Warm up, fill the wavefront, measure from barrier to barrier, drain; a collective call of all ranks."""
    draw = torch.Generator().manual_seed(plan.seed)
    inputs = torch.randn(SAMPLES, *IMAGE_SHAPE, generator=draw)
    data = itertools.repeat((inputs, torch.arange(SAMPLES) % NUM_CLASSES))
    for _ in range(plan.warmup + engine.wavefront.lag * (plan.stages - 1)):
        engine.train_batch(data)
    engine.wait_meter.take_s()
    sleeper.intervals.clear()  # nobody asks for them here
    torch.distributed.barrier()
    started, slept_s, aux_s = time.perf_counter(), sleeper.slept_s, clock.spent_s
    for _ in range(plan.steps):
        engine.train_batch(data)
    torch.distributed.barrier()
    window = Window(
        window_s=time.perf_counter() - started,
        stage_s=sleeper.slept_s - slept_s,
        aux_s=clock.spent_s - aux_s,
        waited_s=engine.wait_meter.take_s(),
    )
    engine.drain()
    return window


if __name__ == "__main__":
    sys.exit(main())
