"""The penalty schedule: what every stage does in a batch."""

from __future__ import annotations

import pytest

from dsaux.schedules import RUNS
from dsaux.schedules.draw import text_grid
from dsaux.schedules.penalty import PenaltySchedule
from dsaux.schedules.timeline import simulate

MICRO_BATCH = ["LoadReplicaBatch", "AuxForward", "LocalForward", "PenaltyLoss", "LocalBackward", "AuxBackward"]
END_OF_BATCH = ["ReduceAuxGrads", "ReduceGrads", "OptimizerStep", "AuxOptimizerStep"]


def names(schedule: PenaltySchedule) -> list[list[str]]:
    return [[cmd.name for cmd in cmds] for cmds in schedule]


def test_penalty_is_the_schedule_of_that_name_once_a_batch() -> None:
    run = RUNS["penalty"](2, 3, 1, num_batches=4)
    assert [type(schedule) for schedule in run] == [PenaltySchedule] * 4


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_every_micro_batch_is_finished_before_the_next_and_the_step_comes_last(micro_batches: int) -> None:
    steps = names(PenaltySchedule(micro_batches, 3, 1))
    assert steps == [MICRO_BATCH] * (micro_batches - 1) + [MICRO_BATCH + END_OF_BATCH]


@pytest.mark.parametrize("stages", [1, 2, 8])
def test_all_stages_do_the_same(stages: int) -> None:
    first = names(PenaltySchedule(3, stages, 0))
    assert all(names(PenaltySchedule(3, stages, stage)) == first for stage in range(stages))


def test_the_aux_sum_runs_under_the_optimizer_step() -> None:
    (step,) = names(PenaltySchedule(1, 2, 0))
    assert step.index("ReduceAuxGrads") < step.index("OptimizerStep") < step.index("AuxOptimizerStep")


def test_one_buffer_is_enough_and_all_use_it() -> None:
    schedule = PenaltySchedule(4, 2, 0)
    assert schedule.num_pipe_buffers() == 1
    assert {cmd.kwargs.get("buffer_id", 0) for cmds in schedule for cmd in cmds} == {0}


def test_a_schedule_can_be_iterated_again() -> None:
    schedule = PenaltySchedule(2, 2, 0)
    assert names(schedule) == names(schedule)


def test_nothing_is_sent_or_received() -> None:
    assert not [name for step in names(PenaltySchedule(4, 4, 2)) for name in step if name[:4] in ("Send", "Recv")]


def test_it_looks_as_drawn() -> None:
    drawing = """
tick      0     1     2     3
stage 0   FB0   FB1   FB2   FB3
stage 1   FB0   FB1   FB2   FB3
stage 2   FB0   FB1   FB2   FB3
"""
    assert text_grid(simulate("penalty", num_stages=3, micro_batches=1, num_batches=4)) == drawing.strip()
    lines = [line.strip() for line in (PenaltySchedule.__doc__ or "").splitlines()]
    assert all(line in lines for line in drawing.strip().splitlines())
