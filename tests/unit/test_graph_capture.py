"""CUDA's side of captured ticks, with a stand-in for CUDA: what is left behind a capture that fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsaux.graph_capture import CudaCapture, leave_default_stream


class Streams:
    """The present stream, and a capture that ends like PyTorch's: an error at its end leaves its stream behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ends_well: bool) -> None:
        self.present, self.ends_well, self.ended, self.states = "main", ends_well, [], []
        generator = SimpleNamespace(clone_state=lambda: "fresh", graphsafe_set_state=self.states.append)
        cuda: dict[str, Any] = {
            "Stream": lambda device: "side",
            "graph_pool_handle": lambda: (0, 1),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "current_stream": lambda device: self.present,
            "default_stream": lambda device: "main",
            "set_stream": self.use,
            "graph": self.graph,
            "default_generators": [generator],
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def use(self, stream: str) -> None:
        self.present = stream

    def end(self, index: int, pool: tuple[int, int]) -> None:
        self.ended.append((index, pool))

    def graph(self, graph: Any, *, pool: Any, stream: str, capture_error_mode: str) -> Streams:
        assert (pool, capture_error_mode) == ((0, 1), "thread_local")
        self.use(stream)
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        if not self.ends_well:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.use("main")


def test_a_capture_runs_the_work_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, ends_well=True)
    seen = []
    CudaCapture(torch.device("cuda", 0)).record(lambda: seen.append(streams.present))
    assert (seen, streams.present, streams.ended) == (["side"], "main", [])


def test_a_capture_stays_on_the_present_stream_if_that_is_not_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, ends_well=True)
    streams.use("of the training")
    seen = []
    CudaCapture(torch.device("cuda", 0)).record(lambda: seen.append(streams.present))
    assert seen == ["of the training"]


def test_the_default_stream_is_left_once(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, waits = Streams(monkeypatch, ends_well=True), []
    made = SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made)
    leave_default_stream(torch.device("cuda", 0))
    leave_default_stream(torch.device("cuda", 0))
    assert streams.present is made
    assert waits == ["main"], "what was begun on the default stream comes first"


def test_a_failed_capture_raises_the_first_cause_and_goes_back_to_the_stream_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams(monkeypatch, ends_well=False)

    def ask() -> None:
        raise ValueError("a layer asks for a number")

    with pytest.raises(ValueError, match="a layer asks for a number"):
        CudaCapture(torch.device("cuda", 0)).record(ask)
    assert (streams.present, streams.ended, streams.states) == ("main", [(0, (0, 1))], ["fresh"])
