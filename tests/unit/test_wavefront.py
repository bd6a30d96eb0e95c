"""The wavefront: which batch is where, and where its data come from."""

from __future__ import annotations

from typing import Any

import pytest

from dsaux.wavefront import Tick, Wavefront


def run(num_stages: int, stage: int, calls: int, *, lag: int = 1, step: int = 0) -> list[tuple[Tick, Any]]:
    """The ticks of some calls and a drain, each with what the stage reads."""
    wavefront = Wavefront(num_stages, stage, lag=lag)
    found = []
    for call in range(calls):
        wavefront.enter(iter([f"batch {call}"]), step=step)
        found.append((wavefront.present(), next(wavefront.take_data() or iter([None]))))
        wavefront.advance()
    while not wavefront.is_empty:
        found.append((wavefront.present(), next(wavefront.take_data() or iter([None]))))
        wavefront.advance()
    return found


def test_it_goes_as_drawn() -> None:
    ticks = [tick.steps for tick, _ in run(3, 0, 4)]
    assert ticks == [(None, None, 0), (None, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, None), (3, None, None)]


@pytest.mark.parametrize("num_stages", [1, 2, 5])
@pytest.mark.parametrize("calls", [1, 2, 7])
def test_every_stage_reads_every_batch_once_and_in_order(num_stages: int, calls: int) -> None:
    for stage in range(num_stages):
        read = [batch for _, batch in run(num_stages, stage, calls) if batch is not None]
        assert read == [f"batch {call}" for call in range(calls)]


def test_without_a_lag_nothing_is_ever_under_way() -> None:
    ticks = run(3, 1, 4, lag=0)
    assert [tick.steps for tick, _ in ticks] == [(0, 0, 0)] * 4, "the engine gives the step of each call"
    assert [batch for _, batch in ticks] == [f"batch {call}" for call in range(4)]


def test_a_new_wavefront_goes_on_with_the_step_that_all_ranks_have_reached() -> None:
    wavefront = Wavefront(2, 0, lag=1)
    for step in (0, 0, 0):
        wavefront.enter(None, step=step)
        wavefront.take_data()
        wavefront.advance()
    assert not wavefront.is_empty
    wavefront.take_data()
    wavefront.advance()
    assert wavefront.is_empty
    wavefront.enter(None, step=3)
    assert wavefront.present().steps == (None, 3)


def test_a_tick_of_the_drain_has_no_new_batch() -> None:
    assert [tick.has_loss for tick, _ in run(3, 0, 2)] == [True, True, False, False]


def test_it_counts_what_this_stage_has_yet_to_read() -> None:
    wavefront = Wavefront(3, 0, lag=1)
    counts = []
    for _ in range(4):
        wavefront.enter(iter(()), step=0)
        wavefront.take_data()
        wavefront.advance()
        counts.append(wavefront.num_unread)
    assert counts == [1, 2, 2, 2]


def test_with_a_negative_lag_the_first_stage_leads() -> None:
    ticks = [tick.steps for tick, _ in run(3, 2, 3, lag=-1)]
    assert ticks == [(0, None, None), (1, 0, None), (2, 1, 0), (None, 2, 1), (None, None, 2)]
    assert [tick.has_loss for tick, _ in run(3, 0, 3, lag=-1)] == [False, False, True, True, True]


@pytest.mark.parametrize("num_stages", [1, 2, 5])
@pytest.mark.parametrize("calls", [1, 2, 7])
def test_with_a_negative_lag_too_every_stage_reads_every_batch_once_and_in_order(num_stages: int, calls: int) -> None:
    for stage in range(num_stages):
        read = [batch for _, batch in run(num_stages, stage, calls, lag=-1) if batch is not None]
        assert read == [f"batch {call}" for call in range(calls)]


@pytest.mark.parametrize("lag", [1, 0, -1])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_it_is_known_ahead_whether_every_stage_will_have_a_batch(num_stages: int, lag: int) -> None:
    wavefront = Wavefront(num_stages, 0, lag=lag)
    for _ in range(2 * num_stages):
        expected = wavefront.will_be_full
        wavefront.enter(None, step=0)
        assert expected == (None not in wavefront.present().steps)
        wavefront.take_data()
        wavefront.advance()
    assert expected
