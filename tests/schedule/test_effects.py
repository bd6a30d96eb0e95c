"""New instructions are checked by a larger table of effects, with no change in the checker."""

from __future__ import annotations

import pytest

from dsaux.schedules import instructions as ins
from dsaux.schedules.check import Report, ScheduleError, check_schedule
from dsaux.schedules.effects import EFFECTS, Effect, Message, Slot
from tests.fixed_schedule import Fixed, Steps


class SendVariable(ins.BufferOpInstruction):
    """Sends without blocking to the stage before."""


class RecvVariable(ins.BufferOpInstruction):
    """Receives what the stage after sent."""


class SendOther(ins.BufferOpInstruction):
    """Sends something else to the next stage."""


class RecvOther(ins.BufferOpInstruction):
    """Receives that."""


class Work(ins.BufferOpInstruction):
    """Makes a variable."""


VARIABLE = Message("variable", to=-1, blocking=False)
OTHER = Message("other", to=+1)
LARGER = {
    **EFFECTS,
    Work: Effect("W", writes=(Slot("refreshed"),), loads=True, once=True),
    SendVariable: Effect("sV", reads=(Slot("refreshed"),), sends=VARIABLE),
    RecvVariable: Effect("rV", writes=(Slot("target"),), receives=VARIABLE),
    SendOther: Effect("sO", reads=(Slot("outputs"),), sends=OTHER),
    RecvOther: Effect("rO", writes=(Slot("other"),), receives=OTHER),
}


def wavefront(*streams: Steps) -> Report:
    fixed = [Fixed(steps, 1, 1, len(streams), stage) for stage, steps in enumerate(streams)]
    return check_schedule(lambda stage: fixed[stage], len(streams), effects=LARGER)


def test_a_larger_table_checks_new_instructions() -> None:
    assert wavefront([[], [RecvVariable(0), Work(0)]], [[Work(0), SendVariable(0)], []]).num_messages == 1


def test_a_send_that_does_not_block_lets_its_rank_go_on() -> None:
    # With a blocking send this would be a deadlock: rank 0 receives only behind the barrier.
    first = [[Work(0), ins.ReduceTiedGrads(), RecvVariable(0)]]
    assert wavefront(first, [[Work(0), SendVariable(0), ins.ReduceTiedGrads()]]).num_collectives == 1


def test_a_receive_waits_for_a_send_that_does_not_block() -> None:
    first = [[RecvVariable(0), Work(0), ins.ReduceTiedGrads()]]
    last = [[Work(0), ins.ReduceTiedGrads(), SendVariable(0)]]
    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits in RecvVariable") as caught:
        wavefront(first, last)
    assert "rank 1 waits in ReduceTiedGrads() (step 0) for rank 0" in str(caught.value)


def test_a_send_that_does_not_block_still_needs_its_receive() -> None:
    with pytest.raises(ScheduleError, match="rank 1 sends variable to rank 0 1 times, but rank 0 receives it 0"):
        wavefront([[Work(0)]], [[Work(0), SendVariable(0)]])


def test_a_message_of_another_kind_is_refused() -> None:
    first = [[ins.LoadMicroBatch(0), ins.ForwardPass(0), ins.SendActivation(0), SendOther(0)]]
    last = [[RecvOther(0), ins.LoadMicroBatch(0), ins.RecvActivation(0), ins.ForwardPass(0)]]
    with pytest.raises(ScheduleError, match=r"gets activation of rank 0 .* but expects other"):
        wavefront(first, last)
