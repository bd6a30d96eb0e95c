"""train.py on a GPU that two ranks share, with CUDA graphs: it trains, saves on a signal, and goes on."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import torch

from dsaux.runtime import EXIT_STOPPED
from tests.launch.small import STEPS_PER_EPOCH, write_config
from tests.launch.start import events, start_ranks
from tests.launch.test_resume import wait_for_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

EPOCHS = 60
STOP_AFTER = 11


@pytest.mark.parametrize("schedule", ["al", "1f1b"])
def test_a_run_stops_on_a_signal_and_goes_on(schedule: str, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "config.json",
        pipeline={"schedule": schedule, "partition": "parameters"},
        run={"epochs": EPOCHS, "eval_every": 30, "cuda_graphs": schedule != "1f1b"},
    )
    run_dir = tmp_path / "run"
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir)]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs1", device="cuda")
    wait_for_step(ranks, run_dir, STOP_AFTER)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.wait() == [EXIT_STOPPED] * 2, ranks.text()
    (stop,) = events(run_dir, "stopped")

    ranks = start_ranks(["--resume", str(run_dir)], world_size=2, folder=tmp_path / "logs2", device="cuda")
    assert ranks.wait() == [0, 0], ranks.text()
    (resumed,) = events(run_dir, "resumed")
    assert resumed["step"] == stop["step"]
    steps = events(run_dir, "step")
    assert [event["step"] for event in steps] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert all(math.isfinite(event["loss"]) for event in steps)
    assert events(run_dir, "eval")[-1]["top1"] > 2 / 7, "better than a guess by far"
    assert "cuda_graphs is true, but" not in ranks.text()
