"""Where the graphs of a tick begin, and which settings have none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dsaux.schedules.lagrangian import LagrangianSchedule
from dsaux.schedules.local import LocalSchedule
from dsaux.schedules.penalty import PenaltySchedule
from dsaux.stage_graph import why_not
from dsaux.tick_graph import CAPTURED, cuts_of


def flat(schedule: Any) -> list[Any]:
    return [instruction for step in schedule.steps() for instruction in step]


@pytest.mark.parametrize(
    ("schedule", "cuts"),
    [
        (PenaltySchedule(2, 3, 1), [0, 5]),
        # load | aux forward, forward | await | loss | post | backward | await | refresh | send | aux backward
        (LagrangianSchedule(1, 3, 1, tick=9), [0, 2, 3, 4, 5]),
        (LagrangianSchedule(1, 3, 0, tick=9), [0, 2, 3]),
        (LagrangianSchedule(1, 3, 2, tick=9), [0, 4, 5]),
        (LagrangianSchedule(2, 3, 1, tick=9), [0, 2, 4, 6, 9, 11]),
        (LagrangianSchedule(1, 1, 0, tick=9), [0]),
        # load | await | forward | post | (nothing that a graph could hold: write) | send | loss, backward
        (LocalSchedule(1, 3, 1, tick=9), [0, 2]),
        (LocalSchedule(1, 3, 0, tick=9), [0, 2]),
        (LocalSchedule(1, 3, 2, tick=9), [0, 1]),
        (LocalSchedule(2, 3, 1, tick=9), [0, 2, 4, 6]),
    ],
)
def test_graphs_begin_behind_what_communicates(schedule: Any, cuts: list[int]) -> None:
    assert list(cuts_of(flat(schedule))) == cuts


def test_a_tick_of_local_that_fills_or_drains_is_cut_nowhere_else() -> None:
    for micro_batches in (1, 2, 3):
        usual = set(cuts_of(flat(LocalSchedule(micro_batches, 3, 1, tick=9))))
        first = LocalSchedule(micro_batches, 3, 1, tick=1)  # nothing was sent before
        last = LocalSchedule(micro_batches, 3, 1, tick=9, num_batches=9)  # nothing more comes
        for schedule in (first, last):
            assert set(cuts_of(flat(schedule))) <= usual


def test_a_tick_that_fills_or_drains_is_cut_nowhere_else() -> None:
    usual = set(cuts_of(flat(LagrangianSchedule(2, 3, 1, tick=9))))
    first = LagrangianSchedule(2, 3, 1, tick=1)  # nothing was sent before
    last = LagrangianSchedule(2, 3, 1, tick=9, num_batches=9)  # nothing more comes
    for schedule in (first, last):
        assert set(cuts_of(flat(schedule))) <= usual
    idle = LagrangianSchedule(2, 3, 1, tick=9, num_batches=8)
    assert not any(isinstance(instruction, CAPTURED) for instruction in flat(idle))


def test_loss_scaling_is_not_captured() -> None:
    engine: Any = SimpleNamespace(
        optimizer=None, module=SimpleNamespace(activation_checkpoint_interval=0), fp16_enabled=lambda: True
    )
    assert why_not(engine) == "fp16 scales the loss by a number that the host keeps"
