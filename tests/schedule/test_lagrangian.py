"""The augmented Lagrangian schedule: a wavefront with fill and drain, its messages, and the faults it could have."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from dsaux.schedules import RUNS
from dsaux.schedules import instructions as ins
from dsaux.schedules.check import Report, ScheduleError, check_named, check_run
from dsaux.schedules.draw import text_grid
from dsaux.schedules.lagrangian import LagrangianSchedule, wavefront_batch
from dsaux.schedules.timeline import simulate
from tests.fixed_schedule import Fixed, Steps
from tests.schedule.edits import drop, move, put_before, put_behind, swap

NAMES = {"al": False, "al-overlap": True}


def run_of(
    stage: int, *, stages: int = 3, micro_batches: int = 1, batches: int = 5, name: str = "al"
) -> list[list[list[str]]]:
    """Names of a stage's instructions: a list per tick of a list per step."""
    schedules = RUNS[name](micro_batches, stages, stage, num_batches=batches)
    return [[[cmd.name for cmd in cmds] for cmds in schedule] for schedule in schedules]


def flat(tick: list[list[str]]) -> list[str]:
    return [name for step in tick for name in step]


# ---- what a stage does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "overlap"), NAMES.items())
def test_a_run_has_a_schedule_a_tick_with_fill_and_drain(name: str, overlap: bool) -> None:
    run = RUNS[name](2, 3, 1, num_batches=4)
    assert [type(schedule) for schedule in run] == [LagrangianSchedule] * (4 + 3 - 1)
    assert [vars(schedule)["tick"] for schedule in run] == list(range(6))
    assert {vars(schedule)["overlap"] for schedule in run} == {overlap}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_every_stage_treats_every_batch_in_order_one_tick_after_the_stage_above(
    name: str, stages: int, batches: int
) -> None:
    for stage in range(stages):
        run = run_of(stage, stages=stages, micro_batches=2, batches=batches, name=name)
        loads = [flat(tick).count("LoadReplicaBatch") for tick in run]
        fill = stages - 1 - stage
        assert loads == [0] * fill + [2] * batches + [0] * stage
        assert [flat(tick).count("OptimizerStep") for tick in run] == [load // 2 for load in loads]


def test_a_tick_of_a_middle_stage_is_as_the_docstring_says() -> None:
    before = ["LoadReplicaBatch", "AuxForward", "LocalForward"]
    end = ["ReduceAuxGrads", "ReduceGrads", "OptimizerStep", "AuxOptimizerStep"]
    first = [
        *[*before, "WaitRecvVariable", "LagrangianLoss"],
        *["LocalBackward", "WaitSendVariable", "RefreshVariable", "AuxBackward"],
    ]
    middle = [*before, "LagrangianLoss", "LocalBackward", "RefreshVariable", "AuxBackward"]
    last = [
        *[*before, "LagrangianLoss", "RecvVariable", "LocalBackward"],
        *["RefreshVariable", "SendVariable", "AuxBackward", *end],
    ]
    assert run_of(1, micro_batches=4)[2] == [first, middle, middle, last]
    assert [flat(run_of(1, micro_batches=1)[2])] == [
        [
            *[*before, "WaitRecvVariable", "LagrangianLoss", "RecvVariable", "LocalBackward"],
            *["WaitSendVariable", "RefreshVariable", "SendVariable", "AuxBackward", *end],
        ]
    ]


def test_the_first_stage_sends_nothing_and_the_last_receives_nothing() -> None:
    names = [{name for tick in run_of(stage) for name in flat(tick)} for stage in range(3)]
    sends, receives = {"RefreshVariable", "SendVariable", "WaitSendVariable"}, {"RecvVariable", "WaitRecvVariable"}
    assert not names[0] & sends
    assert not names[2] & receives
    assert sends | receives <= names[1]


def test_a_stage_without_a_batch_gives_zeros_to_the_aux_sum_and_posts_the_receive_it_may_need() -> None:
    zeros = ["ReduceAuxGrads", "AuxOptimizerStep"]
    assert run_of(0)[0] == [zeros]
    assert run_of(0)[1] == [["RecvVariable", *zeros]]
    assert run_of(2)[5] == [["WaitSendVariable", *zeros]]
    assert run_of(2)[6] == [zeros]


def test_one_stage_sends_nothing_and_has_no_fill() -> None:
    run = run_of(0, stages=1, batches=3)
    assert len(run) == 3
    assert not [name for tick in run for name in flat(tick) if "Variable" in name]


def test_with_overlap_a_sum_is_awaited_one_tick_late_but_for_the_first_and_the_last() -> None:
    ends = [
        [name for name in flat(tick) if name in ("ReduceAuxGrads", "AuxOptimizerStep")]
        for tick in run_of(1, batches=3, name="al-overlap")
    ]
    start, wait = "ReduceAuxGrads", "AuxOptimizerStep"
    assert ends == [[start, wait], [start], [wait, start], [wait, start], [wait, start, wait]]


def test_one_stage_has_nothing_to_overlap() -> None:
    assert run_of(0, stages=1, name="al-overlap") == run_of(0, stages=1)


def test_a_tick_needs_the_number_of_batches_only_when_the_wavefront_drains() -> None:
    known = LagrangianSchedule(2, 3, 1, tick=4, num_batches=9)
    assert [str(cmd) for cmds in known for cmd in cmds] == [
        str(cmd) for cmds in LagrangianSchedule(2, 3, 1, tick=4) for cmd in cmds
    ]


def test_one_buffer_is_enough_and_all_use_it() -> None:
    schedule = LagrangianSchedule(4, 3, 1, tick=2)
    assert schedule.num_pipe_buffers() == 1
    assert {cmd.kwargs.get("buffer_id", 0) for cmds in schedule for cmd in cmds} == {0}


def test_a_schedule_can_be_iterated_again() -> None:
    schedule = LagrangianSchedule(2, 3, 1, tick=2)
    assert [str(cmds) for cmds in schedule] == [str(cmds) for cmds in schedule]


def test_the_batch_of_a_stage_is_none_before_and_behind_the_wavefront() -> None:
    batches = [wavefront_batch(tick, 1, num_stages=3, num_batches=2) for tick in range(5)]
    assert batches == [None, 0, 1, None, None]


@pytest.mark.parametrize("name", NAMES)
def test_it_looks_as_drawn(name: str) -> None:
    drawing = """
tick      0     1     2     3     4     5     6
stage 0   .     .     FB0   FB1   FB2   FB3   FB4
stage 1   .     FB0   FB1   FB2   FB3   FB4   .
stage 2   FB0   FB1   FB2   FB3   FB4   .     .
"""
    assert text_grid(simulate(name, num_stages=3, micro_batches=1, num_batches=5)) == drawing.strip()
    lines = [line.strip() for line in (LagrangianSchedule.__doc__ or "").splitlines()]
    assert all(line in lines for line in drawing.strip().splitlines())


# ---- the checker passes it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_a_run_passes_with_one_message_a_batch_and_boundary_and_one_sum_a_tick(
    name: str, stages: int, micro_batches: int, batches: int
) -> None:
    report = check_named(name, micro_batches, stages, num_batches=batches)
    assert report.num_messages == batches * (stages - 1)
    assert report.num_collectives == batches + stages - 1
    assert report.num_buffers == (1,) * stages


# ---- planted faults ----------------------------------------------------------------------------------------------


class Tick(Fixed):
    """A tick given as a list."""

    def __init__(self, steps: Steps, micro_batches: int, stages: int, stage: int, *, overlap: bool) -> None:
        super().__init__(steps, 1, micro_batches, stages, stage)
        self.overlap = overlap


Runs = list[list[Steps]]
"""Steps by rank and tick."""


def edited(
    edit: Callable[[Runs], object], *, name: str = "al", micro_batches: int = 1, overlap: bool | None = None
) -> Report:
    """Check three stages and five batches after `edit` changed them.

    A stage treats batch 0 in tick 2, 1, 0 (stages 0, 1, 2) and batch 4 four ticks later.
    """
    runs: Runs = [
        [[list(cmds) for cmds in schedule] for schedule in RUNS[name](micro_batches, 3, stage, num_batches=5)]
        for stage in range(3)
    ]
    edit(runs)
    is_overlapped = NAMES[name] if overlap is None else overlap
    return check_run(
        lambda stage: [Tick(steps, micro_batches, 3, stage, overlap=is_overlapped) for steps in runs[stage]],
        3,
        num_batches=5,
    )


IDLE = [[ins.ReduceAuxGrads(), ins.AuxOptimizerStep()]]

FAULTS: dict[str, tuple[Callable[[Runs], object], tuple[int, int, str | None], str]] = {
    # what: change of runs[rank][tick], the rank, step (here the tick) and instruction that are blamed, words
    # -- lag, order and number of batches
    "a stage one tick too early": (
        lambda r: r[0].pop(0),
        (0, 1, "LoadReplicaBatch"),
        "batch 0 in tick 1; stage 0 of 3 has it in tick 2",
    ),
    "a stage one tick too late": (
        lambda r: r[0].insert(2, [list(IDLE[0])]),
        (0, 3, "LoadReplicaBatch"),
        "batch 0 in tick 3; stage 0 of 3 has it in tick 2",
    ),
    "the last stage one tick too late": (
        lambda r: r[2].insert(0, [list(IDLE[0])]),
        (2, 1, "LoadReplicaBatch"),
        "batch 0 in tick 1; stage 2 of 3 has it in tick 0",
    ),
    "the whole wave one tick too late": (
        lambda r: [run.insert(0, [list(IDLE[0])]) for run in r],
        (2, 1, "LoadReplicaBatch"),
        "batch 0 in tick 1; stage 2 of 3 has it in tick 0",
    ),
    "a batch skipped": (
        lambda r: (r[0].pop(4), r[0].insert(4, [list(IDLE[0])])),
        (1, 5, "SendVariable"),
        "rank 1 sends variable to rank 0 5 times, but rank 0 receives it 4 times",
    ),
    "a batch missing at the end": (
        lambda r: r[2].__setitem__(4, [list(IDLE[0])]),
        (1, 4, "RecvVariable"),
        "rank 2 sends variable to rank 1 4 times, but rank 1 receives it 5 times",
    ),
    "a batch too many": (
        lambda r: r[0].append([[ins.LoadReplicaBatch(0)]]),
        (0, 7, "LoadReplicaBatch"),
        "loads micro-batch 5 of 0 to 4",
    ),
    "a batch trained twice": (
        lambda r: put_behind(r[0][2], "LoadReplicaBatch", ins.LoadReplicaBatch(0)),
        (0, 2, "LoadReplicaBatch"),
        "batch 1 in tick 2; stage 0 of 3 has it in tick 3",
    ),
    # -- sends
    "await of a send missing": (
        lambda r: drop(r[1][2], "WaitSendVariable"),
        (1, 2, "RefreshVariable"),
        "overwrites message of micro-batch 0, which WaitSendVariable still needs",
    ),
    "all awaits of sends missing on a stage": (
        lambda r: [drop(r[1][tick], "WaitSendVariable") for tick in range(2, 7)],
        (1, 2, "SendVariable"),
        "starts a transfer of variable, while that of step 1 .* has not been awaited; one may be under way",
    ),
    "await of the last send missing": (
        lambda r: drop(r[1][6], "WaitSendVariable"),
        (1, 5, "SendVariable"),
        "starts a transfer of variable, which is never awaited",
    ),
    "a send awaited twice": (
        lambda r: put_behind(r[1][2], "WaitSendVariable", ins.WaitSendVariable()),
        (1, 2, "WaitSendVariable"),
        "awaits a transfer of variable, but none is under way on this rank",
    ),
    "a send awaited that was not started": (
        lambda r: put_before(r[2][0], "LoadReplicaBatch", ins.WaitSendVariable()),
        (2, 0, "WaitSendVariable"),
        "none is under way on this rank",
    ),
    "a send awaited in its own tick": (
        lambda r: move(r[1][2], "WaitSendVariable", r[1][1], before="AuxOptimizerStep"),
        (1, 1, "WaitSendVariable"),
        "awaits variable in tick 1; it was started in tick 1 and is due in tick 2",
    ),
    "a message overwritten before it has left": (
        lambda r: swap(r[2][1], "WaitSendVariable", "RefreshVariable"),
        (2, 1, "RefreshVariable"),
        "overwrites message of micro-batch 0, which WaitSendVariable still needs",
    ),
    "a message sent before it is written": (
        lambda r: swap(r[2][0], "SendVariable", "RefreshVariable"),
        (2, 0, "SendVariable"),
        "reads message, which nothing has written",
    ),
    "the message of the batch before sent again": (
        lambda r: swap(r[2][1], "SendVariable", "RefreshVariable"),
        (2, 1, "SendVariable"),
        "reads message of micro-batch 0 a second time",
    ),
    "a message not refreshed": (
        lambda r: drop(r[2][1], "RefreshVariable"),
        (2, 1, "SendVariable"),
        "reads message of micro-batch 0 a second time",
    ),
    "a message sent in the tick after": (
        lambda r: move(r[2][0], "SendVariable", r[2][1], before="LoadReplicaBatch"),
        (2, 1, "SendVariable"),
        "batch 0 in tick 1; stage 2 of 3 has it in tick 0",
    ),
    "a message refreshed before the backward pass": (
        lambda r: swap(r[2][0], "LocalBackward", "RefreshVariable"),
        (2, 0, "RefreshVariable"),
        r"reads stage_inputs.grad\[0\], which nothing has written",
    ),
    "a message refreshed when the buffer is free": (
        lambda r: put_before(r[2][0], "RefreshVariable", drop(r[2][0], "AuxBackward")),
        (2, 0, "AuxBackward"),
        r"frees variables\[0\] of micro-batch 0, which RefreshVariable still needs",
    ),
    "a message sent twice": (
        lambda r: put_behind(r[2][3], "SendVariable", ins.SendVariable()),
        (2, 4, "SendVariable"),
        "rank 2 sends variable to rank 1 6 times, but rank 1 receives it 5 times",
    ),
    "a message that is not sent": (
        lambda r: drop(r[1][3], "SendVariable"),
        (0, 5, "RecvVariable"),
        "rank 1 sends variable to rank 0 4 times, but rank 0 receives it 5 times",
    ),
    "a message below the first stage": (
        lambda r: put_before(r[0][2], "ReduceAuxGrads", ins.SendVariable()),
        (0, 2, "SendVariable"),
        "its other end would be stage -1 of 3",
    ),
    # -- receives
    "await of a receive missing": (
        lambda r: drop(r[1][1], "WaitRecvVariable"),
        (1, 1, "LagrangianLoss"),
        "reads received, which is still under way: its receive has not been awaited",
    ),
    "a receive awaited behind its use": (
        lambda r: swap(r[0][3], "WaitRecvVariable", "LagrangianLoss"),
        (0, 3, "LagrangianLoss"),
        "reads received, which is still under way",
    ),
    "a receive awaited twice": (
        lambda r: put_behind(r[1][1], "WaitRecvVariable", ins.WaitRecvVariable()),
        (1, 1, "WaitRecvVariable"),
        "none is under way on this rank",
    ),
    "a receive awaited in its own tick": (
        lambda r: move(r[0][2], "WaitRecvVariable", r[0][1], before="AuxOptimizerStep"),
        (0, 1, "WaitRecvVariable"),
        "awaits variable in tick 1; it was started in tick 1 and is due in tick 2",
    ),
    "a receive never posted": (
        lambda r: drop(r[1][0], "RecvVariable"),
        (2, 4, "SendVariable"),
        "rank 2 sends variable to rank 1 5 times, but rank 1 receives it 4 times",
    ),
    "a receive posted behind its await": (
        lambda r: move(r[1][0], "RecvVariable", r[1][1], before="LagrangianLoss"),
        (1, 1, "WaitRecvVariable"),
        "none is under way on this rank",
    ),
    "a receive posted in the tick after": (
        lambda r: move(r[1][0], "RecvVariable", r[1][1], before="LoadReplicaBatch"),
        (1, 1, "RecvVariable"),
        "posted in tick 1, but rank 2 sends it in tick 0",
    ),
    "a receive posted in the tick before": (
        lambda r: move(r[0][1], "RecvVariable", r[0][0], before="ReduceAuxGrads"),
        (0, 0, "RecvVariable"),
        "posted in tick 0, but rank 1 sends it in tick 1",
    ),
    "a second receive posted while one is under way": (
        lambda r: move(r[1][2], "RecvVariable", r[1][1], before="LocalBackward"),
        (1, 1, "RecvVariable"),
        r"while that of step 1 \(RecvVariable\(\)\) has not been awaited; one may be under way",
    ),
    "a receive posted over one still needed": (
        lambda r: swap(r[1][1], "LagrangianLoss", "RecvVariable"),
        (1, 1, "RecvVariable"),
        "overwrites received of micro-batch 0, which LagrangianLoss still needs",
    ),
    # -- steps
    "an optimizer step missing": (
        lambda r: drop(r[1][2], "OptimizerStep"),
        (1, 3, "LocalForward"),
        "uses weights after 1 of its steps; batch 2 needs 2",
    ),
    "an optimizer step in a tick without a batch": (
        lambda r: r[0][0][0].extend([ins.ReduceGrads(), ins.OptimizerStep()]),
        (0, 0, "ReduceGrads"),
        "reduces gradients of weights of 0 batches",
    ),
    "two optimizer steps in a tick": (
        lambda r: put_behind(r[1][1], "OptimizerStep", ins.OptimizerStep()),
        (1, 1, "OptimizerStep"),
        "the gradients of weights were not reduced since the last step",
    ),
    "an AuxNet step missing on a stage without a batch": (
        lambda r: r[0].__setitem__(0, [[]]),
        (0, 1, "ReduceAuxGrads"),
        "reduction 0 of aux_net in tick 1; every tick has one",
    ),
    "an AuxNet step missing on all stages": (
        lambda r: [(drop(run[3], "ReduceAuxGrads"), drop(run[3], "AuxOptimizerStep")) for run in r],
        (0, 4, "ReduceAuxGrads"),
        "reduction 3 of aux_net in tick 4; every tick has one",
    ),
    "the AuxNet's last step missing on all stages": (
        lambda r: [(drop(run[6], "ReduceAuxGrads"), drop(run[6], "AuxOptimizerStep")) for run in r[1:]],
        (0, 6, "AuxOptimizerStep"),
        "waits for ever: rank 0 waits in AuxOptimizerStep.* for rank 1; rank 1 has finished",
    ),
    "the AuxNet's sum started twice": (
        lambda r: put_behind(r[1][0], "ReduceAuxGrads", ins.ReduceAuxGrads()),
        (1, 0, "ReduceAuxGrads"),
        "reduces gradients of aux_net, while no step has used those that were reduced in step 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_it_is(fault: str) -> None:
    edit, (rank, step, instruction), words = FAULTS[fault]
    with pytest.raises(ScheduleError, match=words) as caught:
        edited(edit)
    found = None if caught.value.instruction is None else caught.value.instruction.name
    assert (caught.value.rank, caught.value.step, found) == (rank, step, instruction)
    assert str(caught.value).startswith(f"rank {rank}, step {step}, {instruction}")


def test_a_tick_in_which_no_stage_steps_the_aux_net_is_found() -> None:
    with pytest.raises(ScheduleError, match="aux_net took 7 steps in 8 ticks; every tick has one") as caught:
        edited(lambda r: [run.append([[]]) for run in r])
    assert (caught.value.rank, caught.value.step, caught.value.instruction) == (0, 7, None)


OVERLAP_FAULTS: dict[str, tuple[Callable[[Runs], object], tuple[int, int, str | None], str]] = {
    "the last sum not awaited": (
        lambda r: drop(r[0][6], "AuxOptimizerStep", -1),
        (0, 6, None),
        "the gradients of aux_net are never used: the optimizer step is missing",
    ),
    "the last sum not awaited on a stage without a batch": (
        lambda r: drop(r[2][6], "AuxOptimizerStep", -1),
        (2, 6, None),
        "the gradients of aux_net are never used: the optimizer step is missing",
    ),
    "a sum started before the one of the tick before was used": (
        lambda r: swap(r[1][3], "AuxOptimizerStep", "ReduceAuxGrads"),
        (1, 3, "ReduceAuxGrads"),
        "reduces gradients of aux_net, while no step has used those that were reduced in step 2",
    ),
    "a step missing": (
        lambda r: drop(r[1][3], "AuxOptimizerStep"),
        (1, 3, "ReduceAuxGrads"),
        "reduces gradients of aux_net, while no step has used those that were reduced in step 2",
    ),
    "a step in the tick of its sum on one stage alone": (
        lambda r: r[1][2][0].append(drop(r[1][3], "AuxOptimizerStep")),
        (1, 3, "AuxForward"),
        "uses aux_net after 3 of its steps, but rank . after 2 in the same tick 3: the copies part",
    ),
    "a step for a sum that was not started": (
        lambda r: put_before(r[1][0], "ReduceAuxGrads", ins.AuxOptimizerStep()),
        (1, 0, "AuxOptimizerStep"),
        "waits for aux_sum, which this rank has not started",
    ),
    "two steps for one sum": (
        lambda r: put_behind(r[1][3], "AuxOptimizerStep", ins.AuxOptimizerStep()),
        (1, 3, "AuxOptimizerStep"),
        "the gradients of aux_net were not reduced since the last step",
    ),
    "a step between this tick's forward and backward pass": (
        lambda r: swap(r[1][3], "AuxBackward", "AuxOptimizerStep"),
        (1, 3, "AuxOptimizerStep"),
        "steps aux_net between the forward and the backward pass of micro-batch 2",
    ),
    "a sum started before this tick's gradients are added": (
        lambda r: swap(r[1][3], "AuxBackward", "ReduceAuxGrads"),
        (1, 3, "ReduceAuxGrads"),
        "the backward pass of micro-batch 2 has not run yet",
    ),
}


@pytest.mark.parametrize("fault", OVERLAP_FAULTS)
def test_a_planted_fault_of_the_overlapped_sum_is_found_where_it_is(fault: str) -> None:
    edit, (rank, step, instruction), words = OVERLAP_FAULTS[fault]
    with pytest.raises(ScheduleError, match=words) as caught:
        edited(edit, name="al-overlap")
    found = None if caught.value.instruction is None else caught.value.instruction.name
    assert (caught.value.rank, caught.value.step, found) == (rank, step, instruction)


def test_without_a_second_buffer_adding_behind_the_reduction_is_a_fault() -> None:
    edited(lambda r: None, name="al-overlap", overlap=True)
    with pytest.raises(ScheduleError, match="adds to the gradients of aux_net after their reduction") as caught:
        edited(lambda r: None, name="al-overlap", overlap=False)
    assert (caught.value.step, type(caught.value.instruction)) == (2, ins.AuxBackward)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_may_not_be_added_to_its_own_sum_late_even_with_a_second_buffer(name: str) -> None:
    # The last micro-batch of a batch comes behind the sum of its batch: it would count for the batch after.
    def early(runs: Runs) -> None:
        put_behind(runs[2][0][:1], "AuxBackward", drop(runs[2][0], "ReduceAuxGrads"))

    with pytest.raises(ScheduleError, match="adds to the gradients of aux_net after their reduction") as caught:
        edited(early, name=name, micro_batches=2)
    assert (caught.value.rank, caught.value.step, type(caught.value.instruction)) == (2, 1, ins.AuxBackward)


MICRO_BATCH_FAULTS: dict[str, tuple[Callable[[Runs], object], tuple[int, int, str], str]] = {
    # two micro-batches, so two steps a tick
    "a message sent when half of it is written": (
        lambda r: put_behind(r[2][1], "RefreshVariable", drop(r[2][1], "SendVariable")),
        (2, 2, "SendVariable"),
        "reads message of micro-batch 3, but it holds micro-batch 2",
    ),
    "a message written behind its send": (
        lambda r: swap(r[2][1][1:], "SendVariable", "RefreshVariable"),
        (2, 3, "SendVariable"),
        "reads message of micro-batch 3, but it holds micro-batch 2",
    ),
    "a micro-batch that is not refreshed": (
        lambda r: drop(r[2][1], "RefreshVariable"),
        (2, 2, "AuxBackward"),
        r"frees variables\[0\] of micro-batch 2, which RefreshVariable still needs",
    ),
    "a micro-batch refreshed twice": (
        lambda r: put_behind(r[2][1], "RefreshVariable", ins.RefreshVariable(0)),
        (2, 2, "RefreshVariable"),
        r"reads variables\[0\] of micro-batch 2 a second time",
    ),
    "a receive posted when half of the last one is used": (
        lambda r: put_behind(r[1][2], "LagrangianLoss", drop(r[1][2], "RecvVariable")),
        (1, 4, "RecvVariable"),
        "overwrites received of micro-batch 2, 3, which LagrangianLoss still needs",
    ),
    "a receive awaited at the second micro-batch": (
        lambda r: put_before(r[1][1][1:], "LagrangianLoss", drop(r[1][1], "WaitRecvVariable")),
        (1, 2, "LagrangianLoss"),
        "reads received, which is still under way",
    ),
    "a send awaited at the second micro-batch": (
        lambda r: put_before(r[1][2][1:], "RefreshVariable", drop(r[1][2], "WaitSendVariable")),
        (1, 4, "RefreshVariable"),
        "overwrites message of micro-batch 0, 1, which WaitSendVariable still needs",
    ),
    "an optimizer step after each micro-batch": (
        lambda r: r[1][1][0].extend([ins.ReduceGrads(), ins.OptimizerStep()]),
        (1, 3, "LocalForward"),
        "uses weights after 1 of its steps; batch 0 needs 0",
    ),
}


@pytest.mark.parametrize("fault", MICRO_BATCH_FAULTS)
def test_a_planted_fault_between_micro_batches_is_found_where_it_is(fault: str) -> None:
    edit, (rank, step, instruction), words = MICRO_BATCH_FAULTS[fault]
    with pytest.raises(ScheduleError, match=words) as caught:
        edited(edit, micro_batches=2)
    found = None if caught.value.instruction is None else caught.value.instruction.name
    assert (caught.value.rank, caught.value.step, found) == (rank, step, instruction)


def _drop(cmds: list[Any], index: int) -> None:
    del cmds[index]


def _double(cmds: list[Any], index: int) -> None:
    cmds.insert(index, cmds[index])


@pytest.mark.parametrize("change", [_drop, _double])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", range(3))
def test_no_instruction_can_be_dropped_or_doubled(
    name: str, rank: int, change: Callable[[list[Any], int], None]
) -> None:
    run = run_of(rank, name=name)
    places = [(tick, index) for tick, (cmds,) in enumerate(run) for index in range(len(cmds))]
    for tick, index in places:
        with pytest.raises(ScheduleError):
            edited(lambda r, tick=tick, index=index: change(r[rank][tick][0], index), name=name)


def test_posting_behind_the_sum_and_awaiting_the_send_before_it_is_a_deadlock() -> None:
    def edit(runs: Runs) -> None:
        put_behind(runs[1][0], "AuxOptimizerStep", drop(runs[1][0], "RecvVariable"))
        put_behind(runs[2][0], "SendVariable", drop(runs[2][1], "WaitSendVariable"))

    with pytest.raises(ScheduleError, match="deadlock") as caught:
        edited(edit)
    assert "rank 1 waits in AuxOptimizerStep() (step 0) for rank 2" in str(caught.value)
    assert "rank 2 waits in WaitSendVariable() (step 0) for rank 1" in str(caught.value)


def test_a_receive_awaited_in_the_tick_of_its_send_before_the_sum_of_the_tick_before_is_a_deadlock() -> None:
    def edit(runs: Runs) -> None:
        move(runs[0][2], "WaitRecvVariable", runs[0][1], before="ReduceAuxGrads")
        move(runs[1][1], "ReduceAuxGrads", runs[1][1], before="LoadReplicaBatch")
        move(runs[1][1], "AuxOptimizerStep", runs[1][1], before="LoadReplicaBatch")

    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits in WaitRecvVariable") as caught:
        edited(edit)
    assert "rank 1 waits in AuxOptimizerStep() (step 1) for rank 0" in str(caught.value)


def test_an_error_draws_the_ticks_around_the_fault_with_the_faulty_cell_marked() -> None:
    with pytest.raises(ScheduleError) as caught:
        edited(lambda r: drop(r[0][2], "WaitRecvVariable"))
    grid = str(caught.value).partition("\n\n")[2].splitlines()
    assert grid[0].split() == ["step", "0", "1", "2", "3", "4", "5", "6"]
    cells = ["aR aS", "rV aR aS", "L0 aF0 F0 >lL0< rV B0 aB0 aR R S aS", "L0 aF0 F0 wR lL0 rV B0 aB0 aR R S aS"]
    assert re.split("  +", grid[1])[1:5] == cells
    assert "wS WaitSendVariable" in grid[-1]
