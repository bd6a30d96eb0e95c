"""New instructions are checked by a larger table of effects, with no change in the checker."""

from __future__ import annotations

import pytest

from dsaux.schedules import instructions as ins
from dsaux.schedules.check import Report, ScheduleError, check_schedule
from dsaux.schedules.effects import EFFECTS, Effect, Message, Slot
from tests.fixed_schedule import Fixed, Steps


class SendNote(ins.BufferOpInstruction):
    """Starts a send to the stage before."""


class AwaitSent(ins.BufferOpInstruction):
    """Waits until it has left."""


class PostNote(ins.BufferOpInstruction):
    """Posts the receive of what the stage after sends."""


class AwaitNote(ins.BufferOpInstruction):
    """Waits until it is there."""


class ReadNote(ins.BufferOpInstruction):
    """Reads it."""


class SendOther(ins.BufferOpInstruction):
    """Sends something else to the next stage."""


class RecvOther(ins.BufferOpInstruction):
    """Receives that."""


class SendLetter(ins.BufferOpInstruction):
    """Starts a send of something else to the stage before."""


class PostLetter(ins.BufferOpInstruction):
    """Posts its receive."""


class Work(ins.BufferOpInstruction):
    """Makes a note."""


NOTE = Message("note", to=-1, blocking=False)
LETTER = Message("letter", to=-1, blocking=False)
OTHER = Message("other", to=+1)
MADE, GOT = Slot("made"), Slot("got")
LARGER = {
    **EFFECTS,
    Work: Effect("W", writes=(MADE,), loads=True, once=True),
    SendNote: Effect("sN", reads=(MADE,), sends=NOTE),
    AwaitSent: Effect("wS", reads=(MADE,), awaits_send=NOTE),
    PostNote: Effect("rN", writes=(GOT,), receives=NOTE),
    AwaitNote: Effect("wN", writes=(GOT,), awaits_receive=NOTE),
    ReadNote: Effect("N", reads=(GOT,)),
    SendLetter: Effect("sL", sends=LETTER),
    PostLetter: Effect("rL", receives=LETTER),
    SendOther: Effect("sO", reads=(Slot("outputs"),), sends=OTHER),
    RecvOther: Effect("rO", writes=(Slot("other"),), receives=OTHER),
}


def wavefront(*streams: Steps) -> Report:
    fixed = [Fixed(steps, 1, 1, len(streams), stage) for stage, steps in enumerate(streams)]
    return check_schedule(lambda stage: fixed[stage], len(streams), effects=LARGER)


def test_a_larger_table_checks_new_instructions() -> None:
    first = [[PostNote(0)], [AwaitNote(0), Work(0)]]
    assert wavefront(first, [[Work(0), SendNote(0)], [AwaitSent(0)]]).num_messages == 1


def test_a_send_that_does_not_block_lets_its_rank_go_on() -> None:
    # With a blocking send this would be a deadlock: rank 0 receives only behind the barrier.
    first = [[Work(0), ins.ReduceTiedGrads(), PostNote(0), AwaitNote(0)]]
    last = [[Work(0), SendNote(0), ins.ReduceTiedGrads(), AwaitSent(0)]]
    assert wavefront(first, last).num_collectives == 1


def test_a_receive_that_does_not_block_lets_its_rank_go_on() -> None:
    first = [[PostNote(0), Work(0), ins.ReduceTiedGrads(), AwaitNote(0)]]
    last = [[Work(0), ins.ReduceTiedGrads(), SendNote(0), AwaitSent(0)]]
    assert wavefront(first, last).num_collectives == 1


def test_a_receive_waits_for_a_send_that_does_not_block() -> None:
    first = [[PostNote(0), AwaitNote(0), Work(0), ins.ReduceTiedGrads()]]
    last = [[Work(0), ins.ReduceTiedGrads(), SendNote(0), AwaitSent(0)]]
    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits in AwaitNote") as caught:
        wavefront(first, last)
    assert "rank 1 waits in ReduceTiedGrads() (step 0) for rank 0" in str(caught.value)


def test_a_started_send_has_left_only_when_its_receive_is_posted() -> None:
    first = [[Work(0), ins.ReduceTiedGrads(), PostNote(0), AwaitNote(0)]]
    last = [[Work(0), SendNote(0), AwaitSent(0), ins.ReduceTiedGrads()]]
    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits in ReduceTiedGrads") as caught:
        wavefront(first, last)
    assert "rank 1 waits in AwaitSent(buffer_id=0) (step 0) for rank 0" in str(caught.value)


def test_a_send_that_does_not_block_still_needs_its_receive() -> None:
    with pytest.raises(ScheduleError, match="rank 1 sends note to rank 0 1 times, but rank 0 receives it 0"):
        wavefront([[Work(0)]], [[Work(0), SendNote(0), AwaitSent(0)]])


def test_what_is_received_may_not_be_read_before_it_was_awaited() -> None:
    first = [[PostNote(0), ReadNote(0), AwaitNote(0), Work(0)]]
    with pytest.raises(ScheduleError, match=r"reads got\[0\], which is still under way") as caught:
        wavefront(first, [[Work(0), SendNote(0), AwaitSent(0)]])
    assert (caught.value.rank, type(caught.value.instruction)) == (0, ReadNote)


@pytest.mark.parametrize("forgotten", [AwaitSent, AwaitNote])
def test_a_transfer_that_is_never_awaited_is_found(forgotten: type[ins.PipeInstruction]) -> None:
    streams: list[Steps] = [[[PostNote(0), AwaitNote(0), Work(0)]], [[Work(0), SendNote(0), AwaitSent(0)]]]
    left = [[[cmd for cmd in cmds if type(cmd) is not forgotten] for cmds in steps] for steps in streams]
    with pytest.raises(ScheduleError, match="starts a transfer of note, which is never awaited") as caught:
        wavefront(*left)
    assert type(caught.value.instruction) is (SendNote if forgotten is AwaitSent else PostNote)


def test_started_messages_of_another_kind_are_refused() -> None:
    first = [[Work(0), PostLetter(0), PostNote(0)]]
    with pytest.raises(ScheduleError, match=r"gets note of rank 1 \(step 0\), but expects letter"):
        wavefront(first, [[Work(0), SendNote(0), SendLetter(0)]])


def test_a_message_of_another_kind_is_refused() -> None:
    first = [[ins.LoadMicroBatch(0), ins.ForwardPass(0), ins.SendActivation(0), SendOther(0)]]
    last = [[RecvOther(0), ins.LoadMicroBatch(0), ins.RecvActivation(0), ins.ForwardPass(0)]]
    with pytest.raises(ScheduleError, match=r"gets activation of rank 0 .* but expects other"):
        wavefront(first, last)
