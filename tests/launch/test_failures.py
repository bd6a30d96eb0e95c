"""What fails on the way: a loss that is no number, a disk that is full. All ranks end or go on, and say so."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from dsaux.checkpoint import find_checkpoint
from tests.launch.small import STEPS_PER_EPOCH, write_config
from tests.launch.start import events, start_ranks

pytestmark = pytest.mark.launch

BAD_STEP = 6
ROOT_NET = f"""
import torch
from torch import nn


class Root(nn.Module):
    # Adds the root of a number that is 0 in one step: there its gradient is no number, and its output is one.

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), 0

    def forward(self, x):
        self.calls += self.training and torch.is_grad_enabled() and x.device.type != "meta"
        return x + (self.weight * (self.calls != {BAD_STEP})).abs().sqrt()


def net(*, num_classes, input_spec):
    head = nn.Sequential(Root(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), head)


def plain_net(*, num_classes, input_spec):
    layers = net(num_classes=num_classes, input_spec=input_spec)
    return nn.Sequential(*layers[:-1], nn.Sequential(*layers[-1][1:]))


def segment(source, target, *, depth, width, first):
    return nn.Sequential(nn.Conv2d(3, target.shape[0], 3, padding=1), Root(), nn.ReLU())
"""


def test_a_loss_that_is_no_number_ends_all_ranks_with_stage_and_step(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", run={"checkpoint_every": 1})
    arguments = ["--ds_config", str(config), "--run_dir", str(tmp_path / "run"), "--set", "optimizer.params.lr=1e30"]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs")
    assert ranks.wait() == [1, 1], ranks.text()
    for rank, log in enumerate(ranks.logs):
        last = log.read_text().splitlines()[-1]
        assert last.startswith(f"[rank {rank} on "), ranks.text()
        assert "the loss" in last, ranks.text()
        assert "in step" in last
        assert "Lower optimizer.params.lr" in last
        assert "stage" in last
    assert [event["event"] for event in events(tmp_path / "run")][-1] == "failed"
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{ranks.port}_*")), "shared memory is left behind"
    if events(tmp_path / "run", "checkpoint"):  # none is written behind a step that went wrong
        found = find_checkpoint(tmp_path / "run")
        assert all(tensor.isfinite().all() for tensor in found.load("layer_00-model_states.pt").values())


@pytest.mark.parametrize(
    ("place", "schedule", "overlap", "log_every"),
    [
        ("a stage", "al", True, 100),
        ("a stage", "1f1b", False, 1),
        ("the AuxNet", "penalty", False, 1),
    ],
)
def test_no_checkpoint_is_written_behind_a_gradient_that_is_no_number(
    place: str, schedule: str, overlap: bool, log_every: int, tmp_path: Path
) -> None:
    (tmp_path / "root_net.py").write_text(ROOT_NET, encoding="utf-8")
    root = f"{tmp_path / 'root_net.py'}:"
    aux = {"overlap": overlap, **({"segment": f"{root}segment"} if place == "the AuxNet" else {})}
    config = write_config(
        tmp_path / "config.json",
        model={"name": f"{root}{'net' if place == 'a stage' else 'plain_net'}"},
        pipeline={"schedule": schedule, "partition": [3]},
        aux={} if schedule == "1f1b" else aux,
        run={"checkpoint_every": 1, "keep": 1, "log_every": log_every},
    )
    ranks = start_ranks(
        ["--ds_config", str(config), "--run_dir", str(tmp_path / "run")], world_size=2, folder=tmp_path / "logs"
    )
    assert ranks.wait() == [1, 1], ranks.text()
    what = "a gradient" if place == "a stage" else "a gradient of the AuxNet"
    when = f"in step {BAD_STEP}{' or before it' if overlap else ''}."
    for log in ranks.logs:
        last = log.read_text().splitlines()[-1]
        assert f"{what} at stage 1 is not a finite number {when}" in last, ranks.text()
    found = find_checkpoint(tmp_path / "run")
    assert found.step == BAD_STEP - 1
    tensors = [found.load(file) for file in found.files if file.endswith("-model_states.pt")]
    assert all(tensor.isfinite().all() for states in tensors for tensor in states.values())


def test_skipped_batches_are_counted_and_told(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", run={"nan": "skip", "epochs": 30, "eval_every": 0})
    arguments = ["--ds_config", str(config), "--run_dir", str(tmp_path / "run"), "--set", "optimizer.params.lr=1e30"]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs")
    assert ranks.wait() == [1, 1], ranks.text()
    skipped = [event["skipped_steps"] for event in events(tmp_path / "run", "step")]
    assert skipped == sorted(skipped)
    assert skipped[-1] > 0
    assert any("steps were left out so far" in event["text"] for event in events(tmp_path / "run", "warning"))
    assert "batches in a row gave a loss or a gradient that is not a finite number" in ranks.text()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit, of util-linux, plays the full disk")
def test_a_full_disk_keeps_the_former_checkpoint_and_the_run(tmp_path: Path) -> None:
    config, run_dir = write_config(tmp_path / "config.json", run={"epochs": 1}), tmp_path / "run"
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir), "--resume", "latest"]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs1")
    assert ranks.wait() == [0, 0], ranks.text()
    arguments += ["--set", "dsaux.run.epochs=3", "--set", "dsaux.run.checkpoint_every=2"]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs2", file_bytes=100_000)
    assert ranks.wait() == [1, 1], ranks.text()
    # On the way it warns and goes on; at the end it is an error.
    warnings = [event for event in events(run_dir, "warning") if "could not be written" in event["text"]]
    assert [event["step"] for event in warnings] == list(range(STEPS_PER_EPOCH + 2, 3 * STEPS_PER_EPOCH, 2))
    assert all("File too large" in event["text"] for event in warnings)
    assert events(run_dir, "step")[-1]["step"] == 3 * STEPS_PER_EPOCH
    for log in ranks.logs:
        assert "could not be written" in log.read_text().splitlines()[-1], ranks.text()
    assert find_checkpoint(run_dir).step == STEPS_PER_EPOCH


def test_figures_on_a_full_disk_do_not_end_the_run(tmp_path: Path) -> None:
    config, run_dir = write_config(tmp_path / "config.json", run={"epochs": 30, "eval_every": 10}), tmp_path / "run"
    monitor = ["--set", "csv_monitor.enabled=true", "--set", f"csv_monitor.output_path={tmp_path / 'csv'}"]
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir), *monitor]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs")
    deadline = time.monotonic() + 200
    while not events(run_dir, "step"):
        assert ranks.is_running(), ranks.text()
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.01)
    for file in (run_dir / "metrics.jsonl", *(tmp_path / "csv").rglob("*.csv")):
        (tmp_path / "full").symlink_to("/dev/full")
        os.replace(tmp_path / "full", file)
    assert ranks.wait() == [0, 0], ranks.text()
    assert ranks.text().count("metrics.jsonl cannot be written: No space left on device") == 1
    assert ranks.text().count("what DeepSpeed monitors cannot be written") == 1
    assert find_checkpoint(run_dir).step == 30 * STEPS_PER_EPOCH
