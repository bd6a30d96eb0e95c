"""The greedy schedule: as drawn, what a stage does in a tick, and faults that the checker finds in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dsaux.schedules import RUNS
from dsaux.schedules.check import ScheduleError, check_named, check_run
from dsaux.schedules.draw import svg, text_grid
from dsaux.schedules.timeline import simulate

DRAWING = """\
tick      0     1     2     3     4
stage 0   FB0   FB1   FB2   .     .
stage 1   .     FB0   FB1   FB2   .
stage 2   .     .     FB0   FB1   FB2"""


def names(stage: int, tick: int, *, stages: int = 3, micro_batches: int = 1, batches: int = 3) -> list[str]:
    schedule = RUNS["local"](micro_batches, stages, stage, num_batches=batches)[tick]
    return [cmd.name for step in schedule for cmd in step]


def test_it_goes_as_drawn() -> None:
    assert text_grid(simulate("local", num_stages=3, micro_batches=1, num_batches=3)) == DRAWING


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batches", [1, 2, 9])
def test_the_checker_proves_it(stages: int, micro_batches: int, batches: int) -> None:
    report = check_named("local", micro_batches, stages, num_batches=batches)
    assert report.num_messages == (stages - 1) * batches, "one message for each boundary and batch"
    assert report.num_collectives == batches + stages - 1, "one sum of figures a tick"


def test_a_stage_in_the_middle_awaits_posts_sends_and_learns() -> None:
    end = ["ReduceAuxGrads", "ReduceGrads", "OptimizerStep", "AuxOptimizerStep"]
    assert names(1, 2, micro_batches=2) == [
        "LoadReplicaBatch", "WaitRecvOutput", "ReceivedForward", "WaitSendOutput", "WriteOutput", "HeadLoss",
        "HeadBackward",
        "LoadReplicaBatch", "ReceivedForward", "RecvOutput", "WriteOutput", "SendOutput", "HeadLoss", "HeadBackward",
        *end,
    ]  # fmt: skip


def test_a_stage_without_a_batch_posts_what_it_will_need_and_awaits_what_it_has_sent() -> None:
    rest = ["ReduceAuxGrads", "AuxOptimizerStep"]
    assert names(2, 0) == rest, "nothing comes before stage 1 has a batch"
    assert names(2, 1) == ["RecvOutput", *rest]
    assert names(0, 3) == ["WaitSendOutput", *rest]
    assert names(0, 4) == rest


def test_no_stage_waits_once_the_wavefront_is_filled() -> None:
    timeline = simulate("local", num_stages=4, micro_batches=2, num_batches=6)
    assert timeline.period == pytest.approx(3.0), "a forward and a backward pass, without an AuxNet"
    assert timeline.end == pytest.approx((6 + 3) * 3.0)
    assert {(flight.sender, flight.receiver) for flight in timeline.flights} == {(0, 1), (1, 2), (2, 3)}
    assert "X sent" in svg(timeline)


def _without(name: str, ticks: range) -> Callable[[int, int, list[Any]], list[Any]]:
    return lambda stage, tick, cmds: [cmd for cmd in cmds if cmd.name != name or tick not in ticks]


def _send_before_writing(stage: int, tick: int, cmds: list[Any]) -> list[Any]:
    order = {"SendOutput": -1, "WriteOutput": 0}
    places = [place for place, cmd in enumerate(cmds) if cmd.name in order]
    swapped = sorted((cmds[place] for place in places), key=lambda cmd: order[cmd.name])
    found = list(cmds)
    for place, cmd in zip(places, swapped, strict=True):
        found[place] = cmd
    return found


def _post_before_forward(stage: int, tick: int, cmds: list[Any]) -> list[Any]:
    post = [cmd for cmd in cmds if cmd.name == "RecvOutput"]
    rest = [cmd for cmd in cmds if cmd.name != "RecvOutput"]
    place = next((place for place, cmd in enumerate(rest) if cmd.name == "ReceivedForward"), 0)
    return rest[:place] + post + rest[place:]


FAULTS: dict[str, tuple[Callable[[int, int, list[Any]], list[Any]], str]] = {
    "a receive that is never awaited": (_without("WaitRecvOutput", range(2, 3)), "still under way"),
    "a send that is never awaited": (_without("WaitSendOutput", range(1, 2)), "which WaitSendOutput still needs"),
    "a batch that is not sent": (
        _without("SendOutput", range(1, 2)),
        "sends output to rank 1 3 times, but rank 1 receives it 4 times",
    ),
    "sent before it is written": (_send_before_writing, "which nothing has written"),
    "a receive over what is still to be read": (_post_before_forward, "which ReceivedForward still needs"),
    "no loss": (_without("HeadLoss", range(9)), "reads loss, which nothing has written"),
    "no optimizer step": (_without("OptimizerStep", range(1, 2)), "uses weights after 0 of its steps; batch 1 needs 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    edit, words = FAULTS[name]

    class Edited:
        """A schedule with an edited stream."""

        def __init__(self, schedule: Any, stage: int, tick: int) -> None:
            self.schedule, self.stage, self.tick = schedule, stage, tick
            self.num_micro_batches = schedule.num_micro_batches

        def num_pipe_buffers(self) -> int:
            return int(self.schedule.num_pipe_buffers())

        def __iter__(self) -> Any:
            return (edit(self.stage, self.tick, list(cmds)) for cmds in self.schedule)

    def make(stage: int) -> list[Any]:
        run = RUNS["local"](1, 3, stage, num_batches=4)
        return [Edited(schedule, stage, tick) for tick, schedule in enumerate(run)]

    with pytest.raises(ScheduleError, match=words):
        check_run(make, 3, num_batches=4)
