"""The benchmark's contestants on real ranks: the exact ones train alike, and all of them sleep alike."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
from contestants import CONTESTANTS, GAUGES, LOCK_STEP, Runner, Seat
from gauges import HollowLayer, hollow_work
from work import OPTIMIZER, Work, loss_of, model_work, sleeping_work

from tests.ranks import run_ranks

pytestmark = pytest.mark.multiprocess
STEPS = 5
TOLERANCE = 1e-5  # float32: sums over micro-batches and ranks differ in their order only
BATCHNORM_TOLERANCE = 1e-4  # likewise, and BatchNorm divides by the deviation of 64 numbers
FORWARD_S, BACKWARD_S = 3.0, 5.0  # of a stage in a step; counted, not slept

Entry = tuple[str, int]
"""A contestant and its number of micro-batches."""
EXACT: tuple[Entry, ...] = (
    ("ddp", 1),
    ("ddp", 4),
    ("deepspeed-1f1b", 1),
    ("deepspeed-1f1b", 4),
    ("deepspeed-dualpipev", 4),
    ("deepspeed-dualpipev", 8),
    ("torch-1f1b", 2),
    ("torch-1f1b", 8),
    ("torch-interleaved", 2),
    ("torch-interleaved", 8),
    ("torch-zbv", 4),
    ("torch-zbv", 8),
)
DECOUPLED: tuple[Entry, ...] = tuple(
    (name, count) for name in ("dsaux-penalty", "dsaux-al", "dsaux-local") for count in (1, 4)
)
TWO_CHUNKS: tuple[Entry, ...] = (("torch-interleaved", 8), ("torch-zbv", 8), ("deepspeed-dualpipev", 8))
PIPELINES: tuple[Entry, ...] = tuple(entry for entry in EXACT if entry[0] != "ddp")
WITH_BATCHNORM: tuple[Entry, ...] = tuple((name, 4) for name in dict(EXACT) if name != "ddp")

Outcome = Mapping[Entry, tuple[list[float | None], float]]
"""What a rank brings back: the loss of each step, and the time that its layers would have slept in all steps."""
Outcomes = list[tuple[Outcome, Outcome]]
"""By rank: with sleeping layers, with BatchNorm."""


# ---- in the ranks ---------------------------------------------------------------------------------------------------


def sleeping(ranks: int) -> Work:
    return sleeping_work(stages=ranks, global_batch=16, forward_s=FORWARD_S, backward_s=BACKWARD_S)


def convolutional(ranks: int) -> Work:
    return model_work("resnet8", image_size=8, global_batch=16)


def train(entries: Sequence[Entry], make_work: Callable[[int], Work]) -> Outcome:
    """Every entry in turn, all in the same processes."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {entry: train_one(entry, make_work(ranks), rank=rank, ranks=ranks) for entry in entries}


def train_one(entry: Entry, work: Work, *, rank: int, ranks: int) -> tuple[list[float | None], float]:
    slept = count_sleeps(work)
    runner = runner_of(entry, work, rank=rank, ranks=ranks)
    slept.clear()  # shapes are found by a forward pass of their own
    losses = [runner.step() for _ in range(STEPS)]
    runner.drain()
    return losses, sum(slept)


def runner_of(entry: Entry, work: Work, *, rank: int, ranks: int) -> Runner:
    """An entry on layers that are shared out by their number."""
    name, micro_batches = entry
    cuts = ranks * max(1, CONTESTANTS[name].chunks)
    bounds = tuple(round(cut * len(work.layers) / cuts) for cut in range(cuts + 1))
    return CONTESTANTS[name].build(work, Seat(rank, ranks, micro_batches, bounds, torch.device("cpu")))


def count_sleeps(work: Work) -> list[float]:
    """The seconds of each sleep, which is counted and not taken."""
    slept: list[float] = []
    if work.sleeper is not None:
        means_s = work.sleeper.means_s
        work.sleeper.sleep = lambda kind, *, samples: slept.append(samples * means_s[kind])  # type: ignore[method-assign]
    return slept


def train_two_ranks() -> tuple[Outcome, Outcome]:
    return train(EXACT + DECOUPLED, sleeping), train(WITH_BATCHNORM, convolutional)


def pass_hollow_layers(entries: Sequence[Entry]) -> Mapping[Entry, int]:
    """How often hollow layers are passed on this rank in all steps of each entry."""
    passes: list[int] = []
    forward = HollowLayer.forward

    def counted(self: HollowLayer, x: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return forward(self, x)

    HollowLayer.forward = counted  # type: ignore[method-assign]
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for entry in entries:
        work = hollow_work(functools.partial(convolutional, ranks))
        runner = runner_of(entry, work, rank=rank, ranks=ranks)
        passes.clear()
        for _ in range(STEPS):
            runner.step()
        runner.drain()
        found[entry] = len(passes)
    return found


def pass_in_lock_step(micro_batches: int) -> tuple[int, list[torch.Tensor]]:
    """Passes of the whole network on this rank in all steps, and its weights behind them."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    work = convolutional(ranks)
    seat = Seat(rank, ranks, micro_batches, (0, len(work.layers)), torch.device("cpu"))
    runner: Any = GAUGES[LOCK_STEP].build(work, seat)
    samples: list[int] = []
    runner.model.register_forward_pre_hook(lambda model, inputs: samples.append(len(inputs[0])))
    for _ in range(STEPS):
        runner.step()
    assert set(samples) == {work.global_batch // micro_batches}
    return len(samples), [parameter.detach().clone() for parameter in runner.model.parameters()]


# ---- the references -------------------------------------------------------------------------------------------------


def plain_losses(work: Work, *, micro_batches: int = 1, momentum: float = OPTIMIZER["momentum"]) -> list[float]:
    """PyTorch alone, in this process."""
    count_sleeps(work)
    model: nn.Module = work.build(0, len(work.layers)).train()
    optimizer = torch.optim.SGD(model.parameters(), **{**OPTIMIZER, "momentum": momentum})
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = zip(*(part.chunk(micro_batches) for part in work.batch(step)), strict=True)
        loss = torch.stack([loss_of(model(x), y) for x, y in parts]).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def two_ranks() -> Outcomes:
    """One start of the ranks for all tests: starting costs more than training."""
    return run_ranks(train_two_ranks, 2)


@pytest.fixture(scope="module")
def four_ranks() -> list[Outcome]:
    """Likewise."""
    return run_ranks(train, 4, TWO_CHUNKS, sleeping)


def losses_of(outcomes: Sequence[Outcome], entry: Entry) -> list[float]:
    """The loss of each step: the mean over the ranks that compute one."""
    by_step = zip(*(outcome[entry][0] for outcome in outcomes), strict=True)
    known = [[loss for loss in losses if loss is not None] for losses in by_step]
    return [sum(losses) / len(losses) for losses in known]


def name_of(entry: Any) -> str:
    return f"{entry[0]}, M={entry[1]}"


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", EXACT, ids=name_of)
def test_an_exact_contestant_has_the_losses_of_one_process(two_ranks: Outcomes, entry: Entry) -> None:
    found = losses_of([sleeping_run for sleeping_run, _ in two_ranks], entry)
    assert found == pytest.approx(plain_losses(sleeping(2)), rel=TOLERANCE)


@pytest.mark.parametrize("entry", TWO_CHUNKS, ids=name_of)
def test_two_chunks_on_each_of_four_ranks_have_the_losses_of_one_process(
    four_ranks: list[Outcome], entry: Entry
) -> None:
    assert losses_of(four_ranks, entry) == pytest.approx(plain_losses(sleeping(4)), rel=TOLERANCE)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_contestant_of_one_process_is_a_plain_loop(micro_batches: int) -> None:
    losses, _ = train_one(("one-process", micro_batches), sleeping(2), rank=0, ranks=1)
    assert losses == pytest.approx(plain_losses(sleeping(2)), rel=TOLERANCE)


def test_the_losses_would_tell_another_update() -> None:
    """Else the comparisons above could not fail."""
    assert plain_losses(sleeping(2), momentum=0.0) != pytest.approx(plain_losses(sleeping(2)), rel=10 * TOLERANCE)


@pytest.mark.parametrize("entry", WITH_BATCHNORM, ids=name_of)
def test_a_pipeline_with_batchnorm_has_the_losses_of_one_process_with_as_many_micro_batches(
    two_ranks: Outcomes, entry: Entry
) -> None:
    found = losses_of([run for _, run in two_ranks], entry)
    expected = plain_losses(convolutional(2), micro_batches=entry[1])
    assert found == pytest.approx(expected, rel=BATCHNORM_TOLERANCE)


@pytest.mark.parametrize("entry", DECOUPLED, ids=name_of)
def test_a_decoupled_contestant_has_a_finite_loss_on_its_last_rank_alone(two_ranks: Outcomes, entry: Entry) -> None:
    first, last = (sleeping_run[entry][0] for sleeping_run, _ in two_ranks)
    assert first == [None] * STEPS
    known = [loss for loss in last if loss is not None]
    assert len(known) == STEPS - (entry[0] == "dsaux-local"), "a greedy batch takes a step to reach the second stage"
    assert all(math.isfinite(loss) for loss in known)


@pytest.mark.parametrize("entry", EXACT + DECOUPLED, ids=name_of)
def test_every_rank_sleeps_as_long_as_its_share_of_the_network_whatever_the_contestant(
    two_ranks: Outcomes, entry: Entry
) -> None:
    for sleeping_run, _ in two_ranks:
        assert sleeping_run[entry][1] == pytest.approx(STEPS * (FORWARD_S + BACKWARD_S))


@pytest.mark.parametrize("entry", TWO_CHUNKS, ids=name_of)
def test_each_of_four_ranks_sleeps_as_long_as_its_share(four_ranks: list[Outcome], entry: Entry) -> None:
    for outcome in four_ranks:
        assert outcome[entry][1] == pytest.approx(STEPS * (FORWARD_S + BACKWARD_S))


def test_every_pipeline_passes_hollow_layers_as_often_as_real_ones() -> None:
    first, last = run_ranks(pass_hollow_layers, 2, PIPELINES)
    layers = len(convolutional(2).layers)
    assert {entry: first[entry] + last[entry] for entry in PIPELINES} == {
        entry: STEPS * entry[1] * layers for entry in PIPELINES
    }


@pytest.mark.parametrize(("micro_batches", "each"), [(1, 1), (4, 2)])
def test_a_lock_step_gauge_passes_its_share_of_the_micro_batches_and_trains_nothing(
    micro_batches: int, each: int
) -> None:
    fresh = [parameter.detach() for parameter in convolutional(2).build(0, len(convolutional(2).layers)).parameters()]
    for passes, weights in run_ranks(pass_in_lock_step, 2, micro_batches):
        assert passes == STEPS * each
        assert all(torch.equal(weight, start) for weight, start in zip(weights, fresh, strict=True))


def test_every_contestant_of_several_ranks_is_tested_here() -> None:
    tested = {name for name, _ in itertools.chain(EXACT, DECOUPLED)}
    assert tested | {"one-process"} == set(CONTESTANTS)
