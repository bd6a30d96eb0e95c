"""CUDA's side of captured ticks, with a stand-in for CUDA: what is left behind a capture that fails."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsaux.graph_capture import CudaCapture, leave_default_stream


class Graph:
    """A graph that nobody replays."""


class Streams:
    """The present stream, and a capture that ends like PyTorch's: an error at its end leaves its stream behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ends_well: bool) -> None:
        self.present, self.ends_well, self.ended, self.states = "main", ends_well, [], []
        self.pools: list[Any] = []
        pools = itertools.count(1)
        generator = SimpleNamespace(clone_state=lambda: "fresh", graphsafe_set_state=self.states.append)
        cuda: dict[str, Any] = {
            "Stream": lambda device: "side",
            "graph_pool_handle": lambda: (0, next(pools)),
            "CUDAGraph": Graph,
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
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
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


def test_recordings_share_a_pool_until_another_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, ends_well=True)
    capture = CudaCapture(torch.device("cuda", 0))
    for _ in range(2):
        capture.record(lambda: None)
    capture.begin_pool()
    capture.record(lambda: None)
    assert streams.pools == [(0, 1), (0, 1), (0, 2)]


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


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_failed_capture_lets_go_of_its_graph_and_its_tensors_at_once(
    ends_well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cycle of the error and the frames in its traceback would keep them until Python looks for cycles."""
    Streams(monkeypatch, ends_well=ends_well)
    held: list[weakref.ref[Any]] = []

    def held_by(made: Any) -> Any:
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: held_by(Graph()))

    def ask() -> None:
        activations = held_by(torch.ones(2))
        raise ValueError(f"a layer asks for a number of {activations.shape}")

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            CudaCapture(torch.device("cuda", 0)).record(ask)
        assert [made() for made in held] == [None, None]
    finally:
        gc.enable()
