"""The fake capture of the tests has the semantics of a CUDA graph: on these the tests of replayed ticks stand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsaux.aux_aside import SegmentAside
from tests.fake_capture import FakeCapture


def test_recording_runs_the_python_and_leaves_all_tensors_as_they_were() -> None:
    total, runs = torch.zeros(2), []
    recording = FakeCapture().record(lambda: (runs.append(1), total.add_(1.0)))
    assert (runs, total.tolist()) == ([1], [0.0, 0.0])
    recording.replay()
    recording.replay()
    assert (runs, total.tolist()) == ([1], [2.0, 2.0])


def test_a_replay_reads_the_tensors_of_the_recording_and_writes_its_outputs_in_place() -> None:
    given, made = torch.ones(2), []
    recording = FakeCapture().record(lambda: made.append((given.view(2, 1) * 2.0).sum()))
    given.fill_(5.0)
    recording.replay()
    assert made[0].item() == 20.0


def test_a_number_of_the_host_is_what_it_was_when_it_was_recorded() -> None:
    total, step = torch.zeros(()), [1.0]
    recording = FakeCapture().record(lambda: total.add_(step[0]))
    step[0] = 100.0
    recording.replay()
    assert total.item() == 1.0


def test_a_backward_pass_and_the_statistics_of_batch_norm_are_replayed() -> None:
    torch.manual_seed(0)
    layer, twin = (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double() for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    static = torch.zeros(4, 2, 5, 5, dtype=torch.float64)
    recording = FakeCapture().record(lambda: layer(static).square().mean().backward())
    assert layer[1].running_mean.tolist() == [0.0] * 3
    for _ in range(2):
        batch = torch.randn(4, 2, 5, 5, dtype=torch.float64)
        static.copy_(batch)
        recording.replay()
        twin.zero_grad()
        twin(batch).square().mean().backward()
        for one, two in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
        assert torch.equal(layer[1].running_mean, twin[1].running_mean)
        assert layer[1].num_batches_tracked == twin[1].num_batches_tracked


def test_a_replay_draws_new_random_numbers_and_the_recording_none() -> None:
    given, made = torch.ones(100), []
    torch.manual_seed(3)
    recording = FakeCapture().record(lambda: made.append(nn.functional.dropout(given, 0.5)))
    drawn = []
    for _ in range(2):
        recording.replay()
        drawn.append(made[0].clone())
    torch.manual_seed(3)
    assert torch.equal(drawn[0], nn.functional.dropout(given, 0.5))
    assert torch.equal(drawn[1], nn.functional.dropout(given, 0.5))
    assert not torch.equal(drawn[0], drawn[1])


def test_a_number_that_the_host_asks_for_ends_a_recording_and_leaves_no_trace() -> None:
    total = torch.zeros(())
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        FakeCapture().record(lambda: total.add_(1.0).item())
    assert total.item() == 0.0


def test_what_a_recording_starts_on_a_side_stream_it_awaits() -> None:
    aside = SegmentAside(lambda source: source * 2.0, torch.device("cpu"))
    given, made = torch.ones(2), []

    def start() -> None:
        made.append(aside.forward(given))

    with pytest.raises(RuntimeError, match="a fork that was not joined to the primary stream"):
        FakeCapture().record(start)
    with pytest.raises(RuntimeError, match="dependency created on uncaptured work"):
        FakeCapture().record(lambda: aside.join())
    recording = FakeCapture().record(lambda: (start(), aside.join()))
    given.fill_(3.0)
    recording.replay()
    assert made[-1].tolist() == [6.0, 6.0]


def test_a_pool_that_has_lost_all_its_recordings_is_not_used_again() -> None:
    capture = FakeCapture()
    first = capture.record(lambda: torch.zeros(2))
    second = capture.record(lambda: torch.zeros(2))
    del first
    capture.record(lambda: torch.zeros(2))
    del second
    with pytest.raises(RuntimeError, match="use_count > 0"):
        capture.record(lambda: torch.zeros(2))
    capture.begin_pool()
    capture.record(lambda: torch.zeros(2))
