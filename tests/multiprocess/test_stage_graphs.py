"""Ticks replayed as graphs train as eager ones do; a fake capture has the semantics of CUDA's on the CPU."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsaux.engine import AuxPipelineEngine
from dsaux.evaluate import evaluate, reestimate_batchnorm
from dsaux.profile import InstructionClock
from dsaux.stage_graph import MOST_FORMS, WARMUP_TICKS, StageGraphs
from tests.fake_capture import FakeCapture
from tests.multiprocess.test_replicas import BF16, ZERO_1
from tests.ranks import run_ranks
from tests.small_engine import Case, build, weights

pytestmark = pytest.mark.multiprocess

STEPS, EVALUATED_AFTER = 12, 7
GRAPHS = {"dsaux": {"run": {"cuda_graphs": True}}}
WARMING_LR = {
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.05, "warmup_num_steps": 20, "warmup_type": "linear"},
    }
}
OVERLAP = {"dsaux": {"aux": {"overlap": True}}}
SKIP = {"dsaux": {"run": {"nan": "skip"}}}


@dataclass(frozen=True)
class Job:
    """A case and further arguments of `run`."""

    case: Case
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Counts:
    """What one rank saw of its graphs."""

    told: list[str]
    recordings: list[list[int]]
    num_kernels: list[int]
    python_runs: int = 0


def two_stages(schedule: str, **options: Any) -> Case:
    return Case((0, 3, 6), schedule, **{"accumulation": 2, "steps": STEPS, "changes": WARMING_LR, **options})


def run(
    case: Case,
    *,
    graphed: bool,
    change: Callable[[AuxPipelineEngine], None] | None = None,
    at_step: Callable[[AuxPipelineEngine, int], None] | None = None,
    data: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[dict[str, Any], Counts]:
    """Train a case; everything that a graph could change, and what the graphs did.

    Args:
        case: the case.
        graphed: with the fake capture, or without graphs.
        change: is given the new engine.
        at_step: is called behind each step.
        data: other micro-batches.
    """
    engine = build(case)
    told: list[str] = []
    runs = [0]
    engine.module.forward_funcs[0].register_forward_hook(functools.partial(count, runs))
    if graphed:
        engine.stage_graphs = StageGraphs(engine, FakeCapture())
        engine.stage_graphs.tell = told.append
    if change is not None:
        change(engine)
    batches = iter(case.replica_batches(engine.grid.get_data_parallel_rank()) if data is None else data)
    rows = []
    for step in range(case.steps):
        loss = float(engine.train_batch(batches))
        figures = (engine.boundary_mismatch, engine.boundary_adjoint, engine.stage_faults)
        rows.append([loss, *(value for figure in figures for value in figure.tolist())])
        if at_step is not None:
            at_step(engine, step)
        if step + 1 in case.drain_after:
            engine.drain()
    engine.drain()
    result = {
        "rows": rows,
        "counts": np.array(
            [float(engine.train_hits), float(engine.train_loss_sum), engine.train_samples, engine.train_batches]
        ),
        "buffers": {name: buffer.numpy().copy() for name, buffer in engine.module.named_buffers()},
        **weights(engine),
    }
    graphs = [] if engine.stage_graphs is None else list(engine.stage_graphs.graphs.values())
    num_kernels = [recording.num_kernels for graph in graphs for recording in graph.recordings.values()]
    return result, Counts(told, [sorted(graph.recordings) for graph in graphs], num_kernels, runs[0])


def count(runs: list[int], *_: Any) -> None:
    runs[0] += 1


def run_jobs(jobs: dict[str, Job]) -> dict[str, list[tuple[dict[str, Any], Counts]]]:
    """Each case without and with graphs, all in the same processes: starting ranks costs more than a case."""
    return {
        name: [run(job.case, graphed=graphed, **job.options) for graphed in (False, True)] for name, job in jobs.items()
    }


@functools.cache
def results(world_size: int) -> list[dict[str, list[tuple[dict[str, Any], Counts]]]]:
    """Of every rank, all of `JOBS` that take so many."""
    jobs = {name: job for name, job in JOBS.items() if job.case.world_size == world_size}
    return run_ranks(run_jobs, world_size, jobs, time_limit_s=500.0)


def both(name: str) -> list[list[tuple[dict[str, Any], Counts]]]:
    """Eager and graphed run of a job on each rank."""
    return [rank[name] for rank in results(JOBS[name].case.world_size)]


def assert_equal(eager: dict[str, Any], graphed: dict[str, Any]) -> None:
    """To the bit: the same kernels run on the same numbers in the same order."""
    for step, (one, two) in enumerate(zip(eager["rows"], graphed["rows"], strict=True)):
        assert np.array_equal(two, one, equal_nan=True), step
    assert np.array_equal(graphed["counts"], eager["counts"], equal_nan=True)
    for part in ("buffers", "stage", "aux", "head"):
        assert graphed[part].keys() == eager[part].keys()
        for name, value in eager[part].items():
            assert np.array_equal(graphed[part][name], value), (part, name)


def agreed(name: str) -> list[Counts]:
    """What the graphs of each rank did in a job whose results agree with the eager run's."""
    counts = []
    for (eager, _), (graphed, after) in both(name):
        assert_equal(eager, graphed)
        assert 0 not in after.num_kernels, "CUDA warns of an empty graph"
        counts.append(after)
    return counts


# ---- equal to eager ticks -----------------------------------------------------------------------------------------


def evaluate_in_between(engine: AuxPipelineEngine, step: int) -> None:
    """What the trainer does: drain, re-estimate BatchNorm in place, evaluate."""
    if step + 1 == EVALUATED_AFTER:
        batches = two_stages("penalty", steps=2).replica_batches(0)
        reestimate_batchnorm(engine, iter(batches), num_batches=2)
        evaluate(engine, iter(batches), num_batches=2)


EQUAL = {
    "penalty": two_stages("penalty"),
    "al": two_stages("al"),
    "al, M=1": two_stages("al", accumulation=1),
    "al with overlap": two_stages("al", changes={**WARMING_LR, **OVERLAP}),
    "local": two_stages("local"),
    "al, K=3": Case((0, 2, 4, 6), "al", steps=STEPS, changes=WARMING_LR),
    "local, K=3": Case((0, 2, 4, 6), "local", steps=STEPS, changes=WARMING_LR),
    "K=1": Case((0, 6), "penalty", steps=STEPS, changes=WARMING_LR),
    "two replicas": two_stages("al", replicas=2, accumulation=1),
}


@pytest.mark.parametrize("name", EQUAL)
def test_neither_batch_nor_learning_rate_nor_loss_leaks_between_replays(name: str) -> None:
    """Every step has another batch and learning rate; an evaluation drains in the middle. Equal to the bit."""
    for counts in agreed(name):
        assert counts.told == []
        assert len(counts.recordings) == 1


HALF = {
    f"bf16, {schedule}": two_stages(schedule, dtype=torch.float32, changes={**WARMING_LR, **BF16})
    for schedule in ("penalty", "al")
}


@pytest.mark.parametrize("name", HALF)
def test_bf16_and_its_float32_gradients_are_replayed(name: str) -> None:
    for counts in agreed(name):
        assert counts.told == []
        assert len(counts.recordings) == 1


def bad_batches() -> list[tuple[Tensor, Tensor]]:
    """Two with an image that is no number: in the tick that captures, and in one that replays."""
    batches = two_stages("penalty", accumulation=1).replica_batches(0)
    for bad in (WARMUP_TICKS, WARMUP_TICKS + 4):
        batches[bad][0][0, 0, 0, 0] = float("nan")
    return batches


def test_a_batch_that_is_no_number_is_skipped_in_a_replay() -> None:
    assert all(len(counts.recordings) == 1 for counts in agreed("skip"))
    rows = both("skip")[0][1][0]["rows"]
    assert [step for step, row in enumerate(rows) if not np.isfinite(row[0])] == [WARMUP_TICKS, WARMUP_TICKS + 4]


def short_batches(steps: int, shapes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of several sizes in turns."""
    batches = Case((0, 6), steps=steps).replica_batches(0)
    return [(inputs[: 4 + step % shapes], labels[: 4 + step % shapes]) for step, (inputs, labels) in enumerate(batches)]


def test_batches_of_two_shapes_have_a_graph_each() -> None:
    for counts in agreed("two shapes"):
        assert counts.told == []
        assert len(counts.recordings) == 2


def double_the_batch(engine: AuxPipelineEngine, step: int) -> None:
    if step == 5:
        engine.set_train_batch_size(2 * engine.train_batch_size())


def test_another_number_of_micro_batches_is_captured_anew() -> None:
    assert all(len(counts.recordings) == 2 for counts in agreed("more micro-batches"))


def go_exact(engine: AuxPipelineEngine, step: int) -> None:
    if step == 5:
        engine.use_exact_schedule(lr=0.01, num_steps=2)


def test_exact_epochs_drop_the_graphs_and_say_so() -> None:
    first, second = agreed("exact epochs")
    assert first.recordings == second.recordings == []
    assert "but schedule 1f1b exchanges activations" in first.told[0]
    assert (len(first.told), len(second.told)) == (1, 0)


def save_and_load(folder: str, engine: AuxPipelineEngine, step: int) -> None:
    place = f"{folder}/{engine.stage_graphs is None}"
    if step == 5:
        engine.save_checkpoint(place, drain=False)
    if step == 7:
        engine.load_checkpoint(place)
        engine.drain()


def test_a_checkpoint_is_saved_and_loaded_between_replays(tmp_path: Path) -> None:
    case = two_stages("al", steps=14)
    data = replace(case, steps=20).replica_batches(0)
    job = Job(case, {"at_step": functools.partial(save_and_load, str(tmp_path)), "data": data})
    for rank in run_ranks(run_jobs, 2, {"job": job}):
        (eager, _), (graphed, counts) = rank["job"]
        assert_equal(eager, graphed)
        assert len(counts.recordings) == 1


# ---- what a replay is ---------------------------------------------------------------------------------------------


def test_python_runs_in_the_warm_up_and_the_capture_only() -> None:
    for (_, eager), (_, graphed) in both("no evaluation"):
        assert eager.python_runs == 2 * STEPS
        assert graphed.python_runs == 2 * (WARMUP_TICKS + 1)
    assert all(len(counts.recordings) == 1 for counts in agreed("no evaluation"))


def test_the_graphs_of_a_tick_are_cut_where_it_communicates() -> None:
    first, middle, last = (counts.recordings for counts in agreed("al, K=3"))
    # AuxForward LocalForward | LagrangianLoss | LocalBackward [| RefreshVariable] | AuxBackward
    assert first == [[0, 2, 3]]
    assert middle == [[0, 2, 3, 4, 5]]
    assert last == [[0, 4, 5]]
    first, middle, last = (counts.recordings for counts in agreed("local, K=3"))
    # ReceivedForward WriteOutput | HeadLoss HeadBackward
    assert first == middle == [[0, 2]]
    assert last == [[0, 1]]


class GrowingLayer(nn.Module):
    """A layer with a number on the host that changes in every step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        made: Tensor = self.layer(x) * (1.0 + 0.1 * self.calls)
        return made


def grow(engine: AuxPipelineEngine) -> None:
    engine.module.forward_funcs[0] = GrowingLayer(engine.module.forward_funcs[0])


def test_a_number_on_the_host_that_is_baked_into_a_graph_is_noticed() -> None:
    """These tests can fail: the layer's scale stays what it was at the capture, and the losses part there."""
    for (eager, _), (graphed, _) in both("growing layer"):
        same = [one[0] == two[0] for one, two in zip(eager["rows"], graphed["rows"], strict=True)]
        assert same[:WARMUP_TICKS] == [True] * WARMUP_TICKS
        assert not any(same[WARMUP_TICKS + 1 :])
        with pytest.raises(AssertionError):
            assert_equal(eager, graphed)


# ---- eager after all ----------------------------------------------------------------------------------------------


class AskingLayer(GrowingLayer):
    """A layer that asks the device for a number, as no captured layer may."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made if float(made.detach().sum()) > -1e9 else made * 2.0


def ask(engine: AuxPipelineEngine) -> None:
    engine.module.forward_funcs[0] = AskingLayer(engine.module.forward_funcs[0])


def without_device(engine: AuxPipelineEngine) -> None:
    if engine.stage_graphs is not None:
        told = engine.stage_graphs.tell
        engine.stage_graphs = StageGraphs(engine, None)
        engine.stage_graphs.tell = told


def timed(engine: AuxPipelineEngine) -> None:
    InstructionClock(engine).__enter__()


def single(schedule: str = "penalty", **options: Any) -> Case:
    return two_stages(schedule, **{"dtype": torch.float32, "steps": 6, **options})


IMMEDIATE = {"bf16": {"enabled": True, "immediate_grad_update": True}}
PROFILER = {"flops_profiler": {"enabled": True, "profile_step": 10**6}}
FALLBACKS: dict[str, tuple[Job, str]] = {
    "CPU": (
        Job(single(), {"change": without_device}),
        "the device is cpu, and only GPUs have them: ticks run eagerly.",
    ),
    "1f1b": (Job(single("1f1b")), "schedule 1f1b exchanges activations between all of its passes"),
    "ZeRO-1": (Job(single(changes=ZERO_1)), "ZeRO deals out the gradients in Python"),
    "immediate update": (Job(single(changes=IMMEDIATE)), "bf16.immediate_grad_update moves the gradients"),
    "timers": (Job(single(changes={"wall_clock_breakdown": True})), "wall_clock_breakdown times every pass"),
    "profiler": (Job(single(changes=PROFILER)), "the FLOPs profiler looks into the forward pass"),
    "checkpointing": (
        Job(single(module_options={"activation_checkpoint_interval": 1})),
        "activation checkpointing runs Python within the backward pass",
    ),
    "clock": (Job(single(), {"change": timed}), "each instruction is timed on its own"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_cannot_be_captured_is_told_once_and_trains_eagerly(name: str) -> None:
    first, second = agreed(name)
    assert len(first.told) == 1
    assert first.told[0].startswith("dsaux.run.cuda_graphs is true, but ")
    assert FALLBACKS[name][1] in first.told[0]
    assert second.told == []  # the same on all ranks
    assert first.recordings == second.recordings == []


def test_a_capture_that_fails_leaves_no_trace_and_says_why_on_its_own_rank() -> None:
    for rank, counts in enumerate(agreed("asking layer")):
        (told,) = counts.told
        assert "their capture failed (RuntimeError: operation not permitted when stream is capturing" in told
        assert told.endswith(f"ticks run eagerly on rank {rank}.")
        assert counts.recordings == []


def test_more_shapes_than_graphs_are_kept_for_run_eagerly() -> None:
    (counts,) = agreed("many shapes")
    (told,) = counts.told
    assert f"the batches have more than {MOST_FORMS} shapes: ticks run eagerly on rank 0." in told
    assert len(counts.recordings) == MOST_FORMS


def test_the_key_on_a_cpu_is_told_to_the_log() -> None:
    (told,) = run_ranks(train_with_the_key, 1)
    assert told == ["dsaux.run.cuda_graphs is true, but the device is cpu, and only GPUs have them: ticks run eagerly."]


def train_with_the_key() -> list[str]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsaux").addHandler(handler)
    case = Case((0, 6), changes=GRAPHS, steps=3)
    engine = build(case)
    data = iter(case.replica_batches(0))
    for _ in range(case.steps):
        engine.train_batch(data)
    return told


def test_a_script_that_sets_no_device_is_at_work_on_that_of_its_own_rank_from_the_first_message_on() -> None:
    first, second = run_ranks(what_is_done_with_devices, 2)
    assert first == ["cuda:0 is set", "the default stream of cuda:0 is left", "a message is sent"]
    assert second == ["cuda:1 is set", "the default stream of cuda:1 is left", "a message is sent"]


def what_is_done_with_devices() -> list[str]:
    """With a GPU as far as `initialize` looks at it; NCCL sends from the one that is set."""
    done: list[str] = []
    gpu = SimpleNamespace(device_name=lambda: "cuda", set_device=lambda index: done.append(f"cuda:{index} is set"))
    send = torch.distributed.all_gather_object

    def all_gather_object(*arguments: Any) -> None:
        done.append("a message is sent")
        send(*arguments)

    with (
        patch("dsaux.bootstrap.get_accelerator", lambda: gpu),
        patch(
            "dsaux.bootstrap.leave_default_stream",
            lambda device: done.append(f"the default stream of {device} is left"),
        ),
        patch("torch.distributed.all_gather_object", all_gather_object),
    ):
        build(Case((0, 3, 6), changes=GRAPHS))
    return done[:3]


MANY_STEPS = (WARMUP_TICKS + 2) * (MOST_FORMS + 1)
JOBS: dict[str, Job] = {
    **{name: Job(case, {"at_step": evaluate_in_between}) for name, case in EQUAL.items()},
    **{name: Job(case) for name, case in HALF.items()},
    **{name: job for name, (job, _) in FALLBACKS.items()},
    "skip": Job(two_stages("penalty", accumulation=1, changes=SKIP), {"data": bad_batches()}),
    "two shapes": Job(Case((0, 3, 6), "penalty", steps=STEPS), {"data": short_batches(STEPS, 2)}),
    "many shapes": Job(Case((0, 6), steps=MANY_STEPS), {"data": short_batches(MANY_STEPS, MOST_FORMS + 1)}),
    "more micro-batches": Job(
        two_stages("al", accumulation=1),
        {"at_step": double_the_batch, "data": two_stages("al", accumulation=1, steps=3 * STEPS).replica_batches(0)},
    ),
    "exact epochs": Job(two_stages("al", steps=8), {"at_step": go_exact}),
    "no evaluation": Job(two_stages("penalty")),
    "growing layer": Job(two_stages("penalty"), {"change": grow}),
    "asking layer": Job(two_stages("al"), {"change": ask}),
}
"""What the tests above look at, by name; each is trained without and with graphs."""
