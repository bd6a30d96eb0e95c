"""The AuxNet's learning rate beside the stages', step by step: each of DeepSpeed's schedules, also after a resume."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dsaux.assemble import cross_entropy
from dsaux.bootstrap import initialize
from dsaux.module import AuxPipelineModule
from tests.ranks import run_ranks
from tests.small_engine import Case, build
from tests.small_net import small_aux_net, small_layers

pytestmark = pytest.mark.multiprocess

STEPS, SAVED_AFTER = 7, 4
STAGE_LR, AUX_LR = 0.1, 0.04
BOUNDS = (0, 3, 6)


@dataclass(frozen=True)
class Rates:
    """A schedule and what it makes of the AuxNet's rate.

    Attributes:
        scheduler: type of the schedule.
        params: its parameters.
        share: the AuxNet's rate over the stages', in each step.
        top: the highest rate that the AuxNet must come to; None where the schedule has no step at its top.
        stage: parameters of the stages' optimizer.
        aux: parameters of the AuxNet's own optimizer; None leaves it with the stages'.
        schedule: penalty, or al.
    """

    scheduler: str
    params: dict[str, Any]
    share: float = AUX_LR / STAGE_LR
    top: float | None = AUX_LR
    stage: dict[str, Any] = field(default_factory=lambda: {"lr": STAGE_LR})
    aux: dict[str, Any] | None = field(default_factory=lambda: {"lr": AUX_LR})
    schedule: str = "penalty"

    def case(self) -> Case:
        """The run."""
        aux = {} if self.aux is None else {"optimizer": {"type": "SGD", "params": self.aux}}
        changes = {
            "optimizer": {"type": "SGD", "params": self.stage},
            "scheduler": {"type": self.scheduler, "params": self.params},
            "dsaux": {"aux": aux},
        }
        return Case(BOUNDS, self.schedule, steps=STEPS, changes=changes)


WARMUP = {"warmup_min_lr": 0.02, "warmup_num_steps": 2, "warmup_type": "linear"}
DECAY = {**WARMUP, "total_num_steps": 8, "warmup_max_lr": 0.1}
CYCLE = {
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "cycle_first_step_size": 2,
    "decay_lr_rate": 1,
    "decay_step_size": 1,
}
RATES = {
    "WarmupLR to the optimizer's own": Rates("WarmupLR", WARMUP),
    "WarmupLR": Rates("WarmupLR", {**WARMUP, "warmup_max_lr": 0.1}),
    "WarmupDecayLR": Rates("WarmupDecayLR", DECAY),
    "WarmupDecayLR, al": Rates("WarmupDecayLR", DECAY, schedule="al"),
    "WarmupDecayLR, stages without an lr": Rates("WarmupDecayLR", DECAY, stage={"momentum": 0.9}),
    "WarmupDecayLR, stages with an lr that it overrides": Rates("WarmupDecayLR", DECAY, stage={"lr": 0.7}),
    "WarmupDecayLR, AuxNet without an lr": Rates("WarmupDecayLR", DECAY, share=1, top=0.1, aux={"momentum": 0.9}),
    "WarmupDecayLR, AuxNet without an optimizer": Rates("WarmupDecayLR", DECAY, share=1, top=0.1, aux=None),
    "WarmupCosineLR": Rates("WarmupCosineLR", {"total_num_steps": 8, "warmup_num_steps": 2}, top=None),
    "OneCycle": Rates("OneCycle", CYCLE),
    "LRRangeTest": Rates("LRRangeTest", {"lr_range_test_min_lr": 0.002, "lr_range_test_step_size": 1}, top=None),
    "LRRangeTest from its default": Rates("LRRangeTest", {"lr_range_test_step_size": 1}, top=None),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = {name: rates.case() for name, rates in RATES.items()}
    return run_ranks(rates_of_each, 2, cases, str(tmp_path_factory.mktemp("rates")))


def rates_of_each(cases: dict[str, Case], folder: str) -> dict[str, tuple[list[Any], list[Any]]]:
    """Of each case the rates of a run that saves on its way, and of a new engine that goes on from there."""
    found = {}
    for number, (name, case) in enumerate(cases.items()):
        where = f"{folder}/{number}"
        straight = rates_of_steps(build(case), case, first=0, save_to=where)
        engine = build(case)
        engine.load_checkpoint(where)
        found[name] = straight, rates_of_steps(engine, case, first=SAVED_AFTER)
    return found


def rates_of_steps(engine: Any, case: Case, *, first: int, save_to: str | None = None) -> list[tuple[float, float]]:
    """Rates of stage and AuxNet with which each step is taken."""
    data, found = iter(case.replica_batches(0)[engine.global_steps :]), []
    for step in range(first, case.steps):
        found.append((engine.optimizer.param_groups[0]["lr"], engine.aux.optimizer.param_groups[0]["lr"]))
        engine.train_batch(data)
        if save_to is not None and step + 1 == SAVED_AFTER:
            engine.save_checkpoint(save_to, drain=False)
    engine.drain()
    return found


@pytest.mark.parametrize("name", RATES)
def test_the_auxnets_own_rate_is_the_top_of_a_curve_in_proportion_to_the_stages(
    name: str, measured: list[dict[str, Any]]
) -> None:
    rates = RATES[name]
    entering = measured[-1][name][0]  # batches enter at the last stage, and the AuxNet's rate goes with them
    stage, aux = zip(*entering, strict=True)
    assert aux == pytest.approx([rates.share * rate for rate in stage], rel=1e-12)
    assert len(set(aux)) > 2, "the rate rests"
    if rates.top is not None:
        assert max(aux) == pytest.approx(rates.top, rel=1e-12)
    assert [pair[1] for pair in measured[0][name][0]] == list(aux), "the replicas have two rates"


@pytest.mark.parametrize("name", RATES)
def test_a_resumed_run_has_the_rates_of_one_that_never_stopped(name: str, measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        straight, resumed = rank[name]
        assert resumed == straight[SAVED_AFTER:]


# ---- a schedule of the caller's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num_warnings", "moves"), [("an object", 1, False), ("a callable", 0, True)])
def test_a_schedule_that_cannot_follow_for_the_auxnet_is_said_in_one_line(
    kind: str, num_warnings: int, moves: bool
) -> None:
    (first, rates), (second, others) = run_ranks(train_with_own_schedule, 2, kind)
    assert len(first) == num_warnings
    assert second == [], "rank 0 alone says it"
    assert all("lr_scheduler" in line and "callable" in line and "\n" not in line for line in first)
    assert rates == others
    assert (len(set(rates)) > 1) == moves


def train_with_own_schedule(kind: str) -> tuple[list[str], list[float]]:
    """Three steps with a schedule given to `dsaux.initialize`; the warnings, and the AuxNet's rates."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsaux").addHandler(handler)
    case = Case(BOUNDS, "penalty", steps=3)
    module = AuxPipelineModule(
        small_layers(), num_stages=2, bounds=BOUNDS, loss_fn=cross_entropy, aux_net=small_aux_net(list(BOUNDS))
    ).to(case.dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=STAGE_LR)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    if kind == "a callable":
        schedule = lambda made_for: torch.optim.lr_scheduler.StepLR(made_for, step_size=1)  # noqa: E731
    engine, _, _, _ = initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=case.document())
    data, rates = iter(case.replica_batches(0)), []
    for _ in range(case.steps):
        rates.append(float(engine.aux.optimizer.param_groups[0]["lr"]))
        engine.train_batch(data)
    return lines, rates
