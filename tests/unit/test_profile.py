"""The clock on instructions: each is counted under its name, every one of our engine's belongs to a term."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsaux.engine import AuxPipelineEngine
from dsaux.profile import OTHER, TERMS, InstructionClock, StreamTimes


class LocalForward:
    """Stands for an instruction; its name is what counts."""


class Strange:
    """An instruction of no term."""


class FakeEngine:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.done: list[Any] = []

    def forward(self, buffer_id: int) -> str:
        self.done.append(buffer_id)
        return "made"

    def fail(self) -> None:
        raise ValueError("no")

    _INSTRUCTION_MAP = {LocalForward: forward, Strange: fail}


def test_instructions_run_as_before_and_are_counted_under_their_names() -> None:
    engine = FakeEngine()
    with InstructionClock(engine) as clock:
        assert engine._INSTRUCTION_MAP[LocalForward](engine, buffer_id=3) == "made"
        with pytest.raises(ValueError, match="no"):
            engine._INSTRUCTION_MAP[Strange](engine)
    assert engine.done == [3]
    assert clock.calls == {"LocalForward": 1, "Strange": 1}
    terms = clock.terms()
    assert set(terms) == {*TERMS, OTHER}
    assert terms["stage"] == clock.seconds["LocalForward"] > 0.0
    assert terms[OTHER] == clock.seconds["Strange"] > 0.0


def test_behind_the_clock_the_engine_is_as_it_was_and_other_engines_never_differ() -> None:
    engine, other = FakeEngine(), FakeEngine()
    with InstructionClock(engine):
        assert other._INSTRUCTION_MAP is FakeEngine._INSTRUCTION_MAP
    assert engine._INSTRUCTION_MAP is FakeEngine._INSTRUCTION_MAP


def test_every_instruction_of_the_engine_belongs_to_one_term() -> None:
    named = [name for names in TERMS.values() for name in names]
    assert len(named) == len(set(named))
    assert {kind.__name__ for kind in AuxPipelineEngine._INSTRUCTION_MAP} <= set(named)


def test_a_step_is_the_time_of_its_instructions_and_what_lies_between() -> None:
    engine = FakeEngine()
    clock = InstructionClock(engine)
    for _ in range(2):
        with clock.step():
            engine._INSTRUCTION_MAP[LocalForward](engine, 0)
        assert engine._INSTRUCTION_MAP is FakeEngine._INSTRUCTION_MAP
    engine._INSTRUCTION_MAP[LocalForward](engine, 0)
    assert clock.calls == {"LocalForward": 2}, "outside of a step nothing is counted"
    assert clock.step_seconds >= sum(clock.seconds.values()) > 0.0


class FakeEvent:
    """An event of a stream that goes on by 5 ms from one record to the next."""

    now_ms = 0.0

    def record(self) -> None:
        FakeEvent.now_ms += 5.0
        self.at_ms = FakeEvent.now_ms

    def synchronize(self) -> None:
        assert self.at_ms

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at_ms - self.at_ms


def test_on_a_gpu_the_time_between_two_events_of_the_stream_counts() -> None:
    times = StreamTimes(FakeEvent)
    for name in ("a", "b", "a"):
        with times.measure(name):
            pass
    with pytest.raises(ValueError, match="no"), times.measure("b"):
        raise ValueError("no")
    assert times.totals() == pytest.approx({"a": 0.010, "b": 0.010})
    for _ in range(2000):  # more than it keeps
        with times.measure("c"):
            pass
    assert times.totals()["c"] == pytest.approx(10.0)
