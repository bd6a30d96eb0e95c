"""The checker passes right schedules and names the place of each planted fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from deepspeed.runtime.pipe.schedule import (
    DataParallelSchedule,
    InferenceSchedule,
    PipeSchedule,
    TrainSchedule,
)

from dsaux.schedules import RUNS
from dsaux.schedules import instructions as ins
from dsaux.schedules.check import Report, ScheduleError, check_named, check_schedule
from dsaux.schedules.penalty import PenaltySchedule
from tests.fixed_schedule import Fixed, Steps
from tests.schedule.edits import drop, put, put_before, swap


def edited(
    kind: type[PipeSchedule],
    edit: Callable[[Steps], object],
    *,
    rank: int,
    micro_batches: int = 4,
    stages: int = 3,
) -> Report:
    """Check a schedule after `edit` changed the steps of one rank."""

    def make(stage: int) -> PipeSchedule:
        schedule = kind(micro_batches, stages, stage)
        steps = [list(cmds) for cmds in schedule]
        if stage == rank:
            edit(steps)
        return Fixed(steps, schedule.num_pipe_buffers(), micro_batches, stages, stage)

    return check_schedule(make, stages)


# ---- right schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("kind", [TrainSchedule, InferenceSchedule, PenaltySchedule])
def test_right_schedules_pass_for_1_to_16_micro_batches(kind: type[PipeSchedule], stages: int) -> None:
    for micro_batches in range(1, 17):
        report = check_schedule(lambda stage, m=micro_batches: kind(m, stages, stage), stages)
        directions = {TrainSchedule: 2, InferenceSchedule: 1, PenaltySchedule: 0}[kind]
        assert report.num_messages == directions * micro_batches * (stages - 1)
        assert report.num_collectives == (kind is not InferenceSchedule)


def test_the_data_parallel_schedule_passes() -> None:
    assert check_schedule(lambda stage: DataParallelSchedule(4, 1, stage), 1).num_messages == 0


@pytest.mark.parametrize("name", sorted(RUNS))
@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_whole_runs_pass_and_their_messages_add_up_over_the_batches(name: str, stages: int, batches: int) -> None:
    report = check_named(name, 4, stages, num_batches=batches)
    per_boundary = {"1f1b": 2 * 4 * batches, "penalty": 0, "al": batches, "al-overlap": batches, "local": batches}[name]
    assert report.num_batches == batches
    assert report.num_messages == per_boundary * (stages - 1)


def test_a_run_is_checked_for_one_batch_more_than_stages_unless_told_otherwise() -> None:
    assert check_named("al", 1, 4).num_batches == 5


def test_a_report_reads_as_one_line_with_its_numbers() -> None:
    text = str(check_named("penalty", 2, 3, num_batches=4))
    assert "\n" not in text
    assert text.startswith("stages 3, batches 4, micro-batches 2, buffers 1/1/1, instructions 192, messages 0")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'zigzag'; allowed are 1f1b, al, al-overlap, local, penalty"):
        check_named("zigzag", 1, 1)


# ---- planted faults -----------------------------------------------------------------------------------

FAULTS: dict[str, tuple[type[PipeSchedule], int, Callable[[Steps], object], int | None, str]] = {
    # what: schedule, rank to change, change, rank that is blamed, words of the error
    "first send dropped": (
        TrainSchedule,
        0,
        lambda s: drop(s, "SendActivation"),
        1,
        "rank 0 sends activation to rank 1 3 times, but rank 1 receives it 4 times",
    ),
    "last send dropped": (
        TrainSchedule,
        0,
        lambda s: drop(s, "SendActivation", -1),
        1,
        "receives it 4 times",
    ),
    "receive dropped": (TrainSchedule, 1, lambda s: drop(s, "RecvActivation"), 0, "receives it 3 times"),
    "receive after its forward": (TrainSchedule, 1, lambda s: s[1].reverse(), 1, "nothing has written"),
    "gradient send dropped": (
        TrainSchedule,
        1,
        lambda s: drop(s, "SendGrad", -1),
        0,
        "rank 1 sends gradient to rank 0 3 times",
    ),
    "wrong buffer sent": (
        TrainSchedule,
        0,
        lambda s: put(s, "SendActivation", ins.SendActivation(1)),
        0,
        r"outputs\[1\], which nothing",
    ),
    "gradient into the wrong buffer": (
        TrainSchedule,
        0,
        lambda s: put(s, "RecvGrad", ins.RecvGrad(1)),
        0,
        "gets micro-batch 0 .* holds micro-batch 1",
    ),
    "backward on the wrong buffer": (
        TrainSchedule,
        0,
        lambda s: put(s, "BackwardPass", ins.BackwardPass(1)),
        0,
        "mixes micro-batches",
    ),
    "buffer out of range": (
        PenaltySchedule,
        1,
        lambda s: put(s, "AuxForward", ins.AuxForward(1)),
        1,
        "buffer 1 of 1",
    ),
    "backward before forward": (
        PenaltySchedule,
        2,
        lambda s: swap(s, "LocalForward", "LocalBackward"),
        2,
        "nothing has written",
    ),
    "1F1B backward before forward": (
        TrainSchedule,
        2,
        lambda s: swap(s, "ForwardPass", "BackwardPass"),
        2,
        "nothing has written",
    ),
    "forward before the AuxNet": (
        PenaltySchedule,
        0,
        lambda s: swap(s, "AuxForward", "LocalForward"),
        0,
        "variables.*nothing has written",
    ),
    "forward before the loss": (
        PenaltySchedule,
        1,
        lambda s: swap(s, "LocalForward", "PenaltyLoss"),
        1,
        r"outputs\[0\], which nothing has written",
    ),
    "loss missing": (
        PenaltySchedule,
        1,
        lambda s: drop(s, "PenaltyLoss"),
        1,
        "reads loss, which nothing has written",
    ),
    "backward on an old loss": (
        PenaltySchedule,
        1,
        lambda s: drop(s, "PenaltyLoss", 2),
        1,
        "reads loss of micro-batch 1 a second time",
    ),
    "AuxNet backward before the stage's": (
        PenaltySchedule,
        1,
        lambda s: swap(s, "LocalBackward", "AuxBackward"),
        1,
        "nothing has written",
    ),
    "reduction without gradients": (
        PenaltySchedule,
        1,
        lambda s: s[0].insert(0, ins.ReduceGrads()),
        1,
        "reduces gradients of weights of 0 batches",
    ),
    "second reduction": (
        PenaltySchedule,
        1,
        lambda s: put_before(s, "OptimizerStep", ins.ReduceGrads()),
        1,
        "reduces gradients of weights, while no step has used those that were reduced in step 3",
    ),
    "optimizer step missing": (PenaltySchedule, 1, lambda s: drop(s, "OptimizerStep"), 1, "step is missing"),
    "1F1B optimizer step missing": (
        TrainSchedule,
        1,
        lambda s: drop(s, "OptimizerStep"),
        1,
        "step is missing",
    ),
    "AuxNet step missing": (PenaltySchedule, 1, lambda s: drop(s, "AuxOptimizerStep"), 1, "step is missing"),
    "reduction missing": (PenaltySchedule, 1, lambda s: drop(s, "ReduceGrads"), 1, "not reduced"),
    "step before reduction": (
        TrainSchedule,
        1,
        lambda s: swap(s, "ReduceGrads", "OptimizerStep"),
        1,
        "not reduced",
    ),
    "reduction before the last backward": (
        PenaltySchedule,
        0,
        lambda s: s[-1].insert(2, ins.ReduceGrads()),
        0,
        "after their reduction",
    ),
    "reduction before a backward that is owed": (
        PenaltySchedule,
        0,
        lambda s: s[-1].insert(3, ins.ReduceGrads()),
        0,
        "backward pass of micro-batch 3",
    ),
    "aux sum before the last AuxNet backward": (
        PenaltySchedule,
        1,
        lambda s: s[-1].insert(5, s[-1].pop(6)),
        1,
        "backward pass of micro-batch 3",
    ),
    "one rank without the aux sum": (
        PenaltySchedule,
        1,
        lambda s: drop(s, "ReduceAuxGrads"),
        1,
        "has not started",
    ),
    "one rank without the AuxNet's end": (
        PenaltySchedule,
        1,
        lambda s: (drop(s, "ReduceAuxGrads"), drop(s, "AuxOptimizerStep")),
        0,
        "waits for ever: rank 0 waits in AuxOptimizerStep.* for rank 1; rank 1 has finished",
    ),
    "other collective": (
        PenaltySchedule,
        2,
        lambda s: s[-1].insert(6, ins.ReduceTiedGrads()),
        None,
        "collective 0 over the stages",
    ),
    "blocking collective on one rank": (
        TrainSchedule,
        1,
        lambda s: drop(s, "ReduceTiedGrads"),
        None,
        "for rank 1; rank 1 has finished",
    ),
    "buffer loaded too early": (
        PenaltySchedule,
        0,
        lambda s: s[0].insert(1, ins.LoadReplicaBatch(0)),
        0,
        "overwrites batch.*still needs",
    ),
    "1F1B buffer used again too early": (
        TrainSchedule,
        0,
        lambda s: (
            put(s, "LoadMicroBatch", ins.LoadMicroBatch(0), 1),
            put(s, "ForwardPass", ins.ForwardPass(0), 1),
        ),
        0,
        r"overwrites outputs\[0\] of micro-batch 0, which BackwardPass, RecvGrad",
    ),
    "extra micro-batch": (
        PenaltySchedule,
        0,
        lambda s: s.insert(0, s[0]),
        0,
        "loads micro-batch 4 of 0 to 3",
    ),
    "micro-batch missing": (PenaltySchedule, 2, lambda s: s.pop(0), 2, "ran on 3 of 4 micro-batches"),
    "forward twice": (PenaltySchedule, 0, lambda s: s[0].insert(2, ins.AuxForward(0)), 0, "second time"),
    "send beyond the last stage": (
        TrainSchedule,
        2,
        lambda s: s[-1].insert(0, ins.SendActivation(0)),
        2,
        "stage 3 of 3",
    ),
    "unknown instruction": (
        PenaltySchedule,
        0,
        lambda s: s[0].insert(0, ins.PipeInstruction()),
        0,
        "no entry in the table",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    kind, rank, edit, blamed, words = FAULTS[fault]
    with pytest.raises(ScheduleError, match=words) as caught:
        edited(kind, edit, rank=rank)
    if blamed is not None:
        assert caught.value.rank == blamed


def test_swapped_sends_deliver_the_wrong_micro_batch() -> None:
    loads = [cmd for buffer in (0, 1) for cmd in (ins.LoadMicroBatch(buffer), ins.ForwardPass(buffer))]
    first = [[*loads, ins.SendActivation(1), ins.SendActivation(0)]]
    last = [[ins.RecvActivation(0), ins.LoadMicroBatch(0), ins.ForwardPass(0)], [ins.RecvActivation(1)]]
    with pytest.raises(ScheduleError, match=r"inputs\[0\] of micro-batch 1, labels\[0\] of micro-batch 0"):
        check_schedule(lambda stage: Fixed([first, last][stage], 2, 2, 2, stage), 2)


def test_all_receive_first_is_a_deadlock_that_names_who_waits_for_whom() -> None:
    # An activation goes up and a gradient comes down; both ranks want to receive before they send.
    first = [[ins.LoadMicroBatch(0), ins.ForwardPass(0), ins.RecvGrad(0), ins.SendActivation(0)]]
    last = [
        [
            ins.LoadMicroBatch(0),
            ins.RecvActivation(0),
            ins.ForwardPass(0),
            ins.BackwardPass(0),
            ins.SendGrad(0),
        ]
    ]
    with pytest.raises(ScheduleError) as caught:
        check_schedule(lambda stage: Fixed([first, last][stage], 1, 1, 2, stage), 2)
    text = str(caught.value)
    assert "deadlock: rank 0 waits in RecvGrad(buffer_id=0) (step 0) for rank 1" in text
    assert "rank 1 waits in RecvActivation(buffer_id=0) (step 0) for rank 0" in text


def test_an_error_draws_the_grid_with_the_faulty_cell_marked() -> None:
    with pytest.raises(ScheduleError) as caught:
        edited(PenaltySchedule, lambda s: drop(s, "AuxForward"), rank=1, micro_batches=1, stages=2)
    message, _, grid = str(caught.value).partition("\n\n")
    assert message.startswith("rank 1, step 0, LocalForward(buffer_id=0): reads variables[0], which nothing")
    assert caught.value.step == 0
    assert isinstance(caught.value.instruction, ins.LocalForward)
    drawing = """
step    0
rank 0  L0 aF0 F0 pL0 B0 aB0 aR R S aS
rank 1  L0 >F0< pL0 B0 aB0 aR R S aS
"""
    assert grid.startswith(drawing.strip())


def test_a_missing_end_is_marked_at_the_last_step() -> None:
    with pytest.raises(ScheduleError) as caught:
        edited(PenaltySchedule, lambda s: drop(s, "OptimizerStep"), rank=0, micro_batches=1, stages=2)
    assert caught.value.instruction is None
    assert "aS >end<" in str(caught.value)
