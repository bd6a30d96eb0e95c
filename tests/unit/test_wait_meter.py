"""The meter of waits: by the wall clock on a CPU, by events of the stream on a GPU (faked here)."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from dsaux import transfers
from dsaux.transfers import WaitMeter


class Work:
    """A transfer that takes a while; on a GPU the wait ends at once and the stream stands still."""

    def __init__(self, clock: list[float] | None = None) -> None:
        self.clock = clock

    def wait(self) -> None:
        if self.clock is None:
            time.sleep(0.02)
        else:
            self.clock[0] += 5.0


class Event:
    """An event of a stream whose clock, in ms, stands in `clock`."""

    clock = [0.0]

    def record(self) -> None:
        self.time_ms = self.clock[0]

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.time_ms - self.time_ms


class Accelerator:
    """As much of DeepSpeed's accelerator as the meter uses."""

    def Event(self, *, enable_timing: bool) -> Event:  # noqa: N802 - DeepSpeed's name
        assert enable_timing
        return Event()


def test_on_a_cpu_the_time_in_wait_counts() -> None:
    meter = WaitMeter(torch.device("cpu"))
    for _ in range(3):
        meter.wait(Work())
    assert meter.take_s() >= 0.06
    assert meter.take_s() == 0.0


@pytest.mark.parametrize("waits", [3, 2500])
def test_on_a_gpu_the_time_that_the_stream_stands_still_counts_however_long_nobody_asks(
    monkeypatch: pytest.MonkeyPatch, waits: int
) -> None:
    monkeypatch.setattr(transfers, "get_accelerator", Accelerator)
    meter: Any = WaitMeter(torch.device("cuda"))
    for _ in range(waits):
        meter.wait(Work(Event.clock))
    assert len(meter._events) <= 1000
    assert meter.take_s() == pytest.approx(0.005 * waits)
    assert meter.take_s() == 0.0
