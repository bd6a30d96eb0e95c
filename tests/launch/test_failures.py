"""What fails on the way: a loss that is no number, a disk that is full. All ranks end or go on, and say so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsaux.checkpoint import find_checkpoint
from tests.launch.small import STEPS_PER_EPOCH, write_config
from tests.launch.start import events, start_ranks

pytestmark = pytest.mark.launch


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
