"""A loss or a gradient that is no finite number: the batch is left out on all ranks, or all know which stage it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsaux.engine import AuxPipelineEngine
from dsaux.stage_graph import WARMUP_TICKS, StageGraphs
from dsaux.step_guard import MOST_SKIPS_IN_A_ROW, LateReader
from tests.fake_capture import FakeCapture
from tests.ranks import run_ranks
from tests.small_engine import Case, build, weights

pytestmark = pytest.mark.multiprocess

STEPS, BAD_STEP = 6, 2
SKIP = {"dsaux": {"run": {"nan": "skip"}}}
ZERO = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
BF16 = {"bf16": {"enabled": True}}
SINGLE = torch.float32

CASES = {
    "penalty": Case((0, 2, 6), "penalty", accumulation=2, changes=SKIP),
    "penalty, Adam": Case((0, 2, 6), "penalty", changes={**SKIP, **ADAM}),
    "penalty, bf16": Case((0, 2, 6), "penalty", dtype=SINGLE, changes={**SKIP, **BF16}),
    "penalty, 3 stages": Case((0, 2, 4, 6), "penalty", changes=SKIP),
    "local": Case((0, 2, 6), "local", accumulation=2, changes=SKIP),
    "local, 3 stages": Case((0, 2, 4, 6), "local", changes=SKIP),
    "1f1b": Case((0, 2, 6), "1f1b", accumulation=2, changes=SKIP),
    "penalty, 2 replicas, ZeRO-1": Case((0, 2, 6), "penalty", replicas=2, dtype=SINGLE, changes={**SKIP, **ZERO}),
    "1f1b, 2 replicas": Case((0, 2, 6), "1f1b", replicas=2, accumulation=2, changes=SKIP),
}


def stream(case: Case, replica: int, *, bad: bool) -> list[Any]:
    """Micro-batches with one image that is no number in the bad step of replica 0, or without that step at all."""
    found = case.replica_batches(replica)
    first = BAD_STEP * case.accumulation
    if not bad:
        return found[:first] + found[first + case.accumulation :]
    if replica == 0:
        images, labels = found[first]
        images = images.clone()
        images[0, 0, 0, 0] = float("nan")
        found[first] = images, labels
    return found


def train_on(case: Case, *, bad: bool) -> dict[str, Any]:
    """Weights and buffers after all batches."""
    engine = build(case)
    batches = stream(case, engine.grid.get_data_parallel_rank(), bad=bad)
    data = iter(batches)
    for _ in range(len(batches) // case.accumulation):
        engine.train_batch(data)
    engine.drain()
    buffers = {name: buffer.double().numpy().copy() for name, buffer in engine.module.named_buffers()}
    return {**weights(engine), "buffers": buffers, "skipped": engine.skipped_steps, "steps": engine.global_steps}


def with_and_without(cases: dict[str, Case]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each case with the bad batch and without it."""
    return {name: (train_on(case, bad=True), train_on(case, bad=False)) for name, case in cases.items()}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_skipped_batch_leaves_no_trace_in_any_stage(world_size: int) -> None:
    cases = {name: replace(case, steps=STEPS) for name, case in CASES.items() if case.world_size == world_size}
    for rank in run_ranks(with_and_without, world_size, cases):
        for name, (with_bad, without) in rank.items():
            assert (with_bad["skipped"], with_bad["steps"]) == (1, STEPS), name
            assert (without["skipped"], without["steps"]) == (0, STEPS - 1), name
            for part in ("stage", "aux", "head", "buffers"):
                for key, value in with_bad[part].items():
                    assert np.isfinite(value).all(), f"{name}: {key}"
                    assert np.array_equal(value, without[part][key]), f"{name}: {key}"


def test_under_al_every_stage_skips_the_batch_when_its_turn_comes() -> None:
    case = Case((0, 2, 4, 6), "al", steps=STEPS, changes=SKIP)
    for rank in run_ranks(train_on_bad, 3, case):
        assert (rank["skipped"], rank["steps"]) == (1, STEPS)
        for part in ("stage", "aux", "buffers"):
            assert all(np.isfinite(value).all() for value in rank[part].values())


def train_on_bad(case: Case) -> dict[str, Any]:
    """With the bad batch."""
    return train_on(case, bad=True)


@pytest.mark.parametrize("schedule", ["penalty", "al", "local"])
def test_all_ranks_learn_which_stages_saw_it(schedule: str) -> None:
    case = Case((0, 2, 6), schedule, steps=STEPS)
    first, second = run_ranks(faults_by_step, 2, case)
    assert first == second
    assert all(not any(faults) for faults in first[:BAD_STEP])
    # A batch enters at both stages, at the last one, at the first one.
    assert first[BAD_STEP] == {"penalty": [1, 1], "al": [0, 1], "local": [1, 0]}[schedule]


def faults_by_step(case: Case) -> list[list[float]]:
    """Faults of each stage behind each step up to the bad one."""
    engine = build(case)
    data = iter(stream(case, 0, bad=True))
    found = []
    for _ in range(BAD_STEP + 1):
        engine.train_batch(data)
        found.append(engine.stage_faults.tolist())
    return found


# ---- gradients --------------------------------------------------------------------------------------------------


OVERLAP = {"dsaux": {"aux": {"overlap": True}}}
IN_BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
BAD_GRADIENTS = {
    "penalty": Case((0, 2, 6), "penalty", accumulation=2),
    "penalty, K=1": Case((0, 6), "penalty"),
    "penalty, bf16": Case((0, 2, 6), "penalty", dtype=SINGLE, accumulation=2, changes=BF16),
    "penalty, ZeRO-1": Case((0, 2, 6), "penalty", dtype=SINGLE, changes=ZERO),
    "penalty, ZeRO-1, sums in another precision": Case(
        (0, 2, 6), "penalty", dtype=SINGLE, changes={**ZERO, **IN_BF16_SUMS}
    ),
    "penalty, ZeRO-1, bf16 sums": Case((0, 2, 6), "penalty", dtype=SINGLE, changes={**ZERO, **BF16, **IN_BF16_SUMS}),
    "al": Case((0, 2, 6), "al"),
    "al with overlap": Case((0, 2, 6), "al", changes=OVERLAP),
    "local": Case((0, 2, 6), "local", accumulation=2),
    "1f1b": Case((0, 2, 6), "1f1b", accumulation=2),
    "al, 2 replicas": Case((0, 2, 6), "al", replicas=2),
    "1f1b, 2 replicas": Case((0, 2, 6), "1f1b", replicas=2),
    "penalty, bf16, ZeRO-1, 2 replicas": Case((0, 2, 6), replicas=2, dtype=SINGLE, changes={**BF16, **ZERO}),
}


class RootLayer(nn.Module):
    """A first layer with the mean root of its weighted input: finite, but where a pixel is 0 its gradient is not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight = next(self.layer.parameters()).flatten()[0]
        made: Tensor = self.layer(x)
        return made + (weight * x).abs().sqrt().mean()


def with_root(case: Case) -> AuxPipelineEngine:
    engine = build(case)
    if engine.stage_id == 0:
        engine.module.forward_funcs[0] = RootLayer(engine.module.forward_funcs[0])
    return engine


def black_pixel(case: Case, replica: int, bad: int) -> list[Any]:
    """Micro-batches of which one of the last replica has a pixel that is 0."""
    found = case.replica_batches(replica)
    if replica == case.replicas - 1:
        found[bad * case.accumulation][0][0, 0, 0, 0] = 0.0
    return found


def first_faults(cases: dict[str, Case], bad: int, graphed: bool) -> dict[str, tuple[list[float], list[str | None]]]:
    """Losses and the fault that is known behind each step up to the bad one, and the K-1 after it under al."""
    found = {}
    for name, case in cases.items():
        engine = with_root(case)
        if graphed:
            engine.stage_graphs = StageGraphs(engine, FakeCapture())
        data = iter(black_pixel(case, engine.grid.get_data_parallel_rank(), bad))
        losses, faults = [], []
        for _ in range(bad + 1 + (case.schedule == "al")):
            losses.append(float(engine.train_batch(data)))
            faults.append(engine.find_fault(wait=True))
        found[name] = losses, faults
        if graphed:
            assert len(engine.stage_graphs.graphs) == 1, name
    return found


def assert_found(rank: dict[str, tuple[list[float], list[str | None]]]) -> None:
    for name, (losses, faults) in rank.items():
        assert faults == [None] * (len(faults) - 1) + ["a gradient at stage 0"], name
        if not name.startswith("local"):  # there no batch has come to the last stage in the first step
            assert np.isfinite(losses).all(), name


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_know_a_gradient_that_is_no_number_behind_the_same_step(world_size: int) -> None:
    cases = {name: replace(case, steps=STEPS) for name, case in BAD_GRADIENTS.items() if case.world_size == world_size}
    for rank in run_ranks(first_faults, world_size, cases, BAD_STEP, False):
        assert_found(rank)


def test_a_gradient_that_is_no_number_is_seen_in_a_replay() -> None:
    graphs = {"dsaux": {"run": {"cuda_graphs": True}}}
    bad = WARMUP_TICKS + 3
    cases = {
        name: replace(BAD_GRADIENTS[name], steps=bad + 2, changes={**BAD_GRADIENTS[name].changes, **graphs})
        for name in ("penalty", "penalty, bf16", "al", "local")
    }
    for rank in run_ranks(first_faults, 2, cases, bad, True):
        assert_found(rank)


@pytest.mark.parametrize("name", ["penalty", "al with overlap", "1f1b"])
def test_a_checkpoint_from_before_takes_a_fault_back(name: str, tmp_path: Path) -> None:
    case = replace(BAD_GRADIENTS[name], steps=STEPS)
    for before, behind, later in run_ranks(faults_around_a_reload, 2, case, str(tmp_path)):
        assert (before, behind, later) == ("a gradient at stage 0", None, None)


def faults_around_a_reload(case: Case, folder: str) -> tuple[str | None, ...]:
    """The fault that is known behind a bad step, behind the load of a checkpoint, and behind a good step from there."""
    engine = with_root(case)
    engine.save_checkpoint(folder)
    engine.train_batch(iter(black_pixel(case, 0, 0)))
    engine.drain()
    before = engine.find_fault(wait=True)
    engine.load_checkpoint(folder)
    behind = engine.find_fault(wait=True)
    engine.train_batch(iter(case.replica_batches(0)))
    engine.drain()
    return before, behind, engine.find_fault(wait=True)


class BadGradient:
    """Forward hook: in one call the gradient of the output is no number on its way back."""

    def __init__(self, bad_call: int) -> None:
        self.calls, self.bad_call = 0, bad_call

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.calls == self.bad_call:
            output.register_hook(lambda gradient: gradient * float("nan"))
        self.calls += 1


def train_with_bad_aux_net(case: Case, *, bad: bool) -> dict[str, Any]:
    """Weights behind all steps, one of which has a gradient in the AuxNet of the last stage alone that is no number."""
    engine = build(case)
    if bad and engine.is_last_stage():
        assert engine.aux.net is not None
        engine.aux.net.segments[0].register_forward_hook(BadGradient(BAD_STEP))
    batches = case.replica_batches(0)
    for images, labels in batches if bad else batches[:BAD_STEP] + batches[BAD_STEP + 1 :]:
        engine.train_batch(iter([(images, labels)]))
    engine.drain()
    return {**weights(engine), "skipped": engine.skipped_steps}


def with_and_without_bad_aux_net(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same with the bad step and without its batch."""
    return train_with_bad_aux_net(case, bad=True), train_with_bad_aux_net(case, bad=False)


def test_a_batch_with_a_bad_gradient_of_the_aux_net_is_skipped_without_a_trace() -> None:
    case = Case((0, 2, 6), "penalty", steps=STEPS, changes=SKIP)
    for with_bad, without in run_ranks(with_and_without_bad_aux_net, 2, case):
        assert (with_bad["skipped"], without["skipped"]) == (1, 0)
        for part in ("stage", "aux"):
            for key, value in with_bad[part].items():
                assert np.array_equal(value, without[part][key]), key


def test_under_al_the_aux_net_rests_and_its_stage_skips_where_a_gradient_of_it_is_no_number() -> None:
    case = Case((0, 2, 6), "al", steps=STEPS, changes=SKIP)
    first, last = run_ranks(train_with_bad_aux_net_at_last, 2, case)
    assert (first["skipped"], last["skipped"]) == (0, 1)
    for rank in (first, last):
        for part in ("stage", "aux"):
            assert all(np.isfinite(value).all() for value in rank[part].values())


def train_with_bad_aux_net_at_last(case: Case) -> dict[str, Any]:
    """With the bad step."""
    return train_with_bad_aux_net(case, bad=True)


# ---- ends and stops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["penalty", "al", "local", "1f1b"])
def test_a_run_of_bad_batches_ends_with_an_error_on_every_rank(schedule: str) -> None:
    case = Case((0, 2, 6), schedule, steps=MOST_SKIPS_IN_A_ROW + 5, changes=SKIP)
    first, last = run_ranks(train_on_nothing_but_bad, 2, case, ends_early=True)
    leading = first if schedule == "local" else last
    assert f"{MOST_SKIPS_IN_A_ROW + 1} batches in a row" in leading
    if schedule not in ("al", "local"):  # there the other stage is a batch behind, and loses its peer
        assert first == last


def train_on_nothing_but_bad(case: Case) -> str:
    """The error that ends it."""
    engine = build(case)
    data = iter([(images * float("nan"), labels) for images, labels in case.replica_batches(0)])
    try:
        for _ in range(case.steps):
            engine.train_batch(data)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("schedule", ["penalty", "al", "local", "1f1b"])
def test_all_ranks_agree_to_stop_behind_the_same_step(schedule: str) -> None:
    case = Case((0, 2, 6), schedule, steps=STEPS)
    first, second = run_ranks(stop_on_rank_1, 2, case)
    assert first == second
    assert first in (2, 3)


def stop_on_rank_1(case: Case) -> int:
    """The step behind which this rank stops, where rank 1 has asked for it before the second."""
    engine = build(case)
    data = iter(case.replica_batches(0))
    for step in range(case.steps):
        if step == 1 and engine.global_rank == 1:
            engine.request_stop()
        engine.train_batch(data)
        if engine.stop_is_agreed:
            return step + 1
    return -1


def test_a_late_reader_gives_each_value_a_set_number_of_steps_later() -> None:
    reader = LateReader(torch.device("cpu"), delay=2)
    seen = []
    for value in range(1, 6):
        reader.put(torch.tensor(float(value)))
        seen.append(reader.get())
    assert seen == [0.0, 0.0, 1.0, 2.0, 3.0]
