"""Stopped by a signal, resumed: the run that follows is the one that was never stopped."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from dsaux.checkpoint import find_checkpoint
from dsaux.runtime import EXIT_STOPPED
from tests.launch.small import STEPS_PER_EPOCH, write_config
from tests.launch.start import Ranks, events, start_ranks

pytestmark = pytest.mark.launch

EPOCHS = 20
STOP_AFTER = 11  # in the middle of the second epoch


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint's layers, AuxNet and optimizers, by file and name."""
    found = find_checkpoint(run_dir)
    tensors: dict[str, torch.Tensor] = {}

    def collect(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{name}/{key}")

    for file in found.files:
        if file.startswith(("layer_", "aux_net", "head_")):
            collect(found.load(file), file)
    return tensors


def assert_same_run(one: Path, other: Path) -> None:
    """Same losses in every step, same evaluations, same weights and optimizer state, to the bit."""
    for kind, keys in (("step", ("loss", "learning_rate", "boundary_mismatch")), ("eval", ("top1", "loss"))):
        first, second = ({event["step"]: event for event in events(path, kind)} for path in (one, other))
        assert first.keys() == second.keys()
        for step, event in first.items():
            assert [event[key] for key in keys] == [second[step][key] for key in keys], (kind, step)
    first_weights, second_weights = weights(one), weights(other)
    assert first_weights.keys() == second_weights.keys()
    for name, tensor in first_weights.items():
        assert torch.equal(tensor, second_weights[name]), name


def wait_for_step(ranks: Ranks, run_dir: Path, step: int) -> None:
    """Return when a step has been logged."""
    deadline = time.monotonic() + 200
    while not any(event["step"] >= step for event in events(run_dir, "step")):
        assert ranks.is_running(), ranks.text()
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("schedule", "number"), [("al", signal.SIGTERM), ("local", signal.SIGTERM), ("1f1b", signal.SIGUSR1)]
)
def test_a_run_that_a_signal_stopped_goes_on_to_the_bit(schedule: str, number: signal.Signals, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "config.json", pipeline={"schedule": schedule}, run={"epochs": EPOCHS, "eval_every": 10}
    )
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    ranks = start_ranks(
        ["--ds_config", str(config), "--run_dir", str(straight)], world_size=2, folder=tmp_path / "logs1"
    )
    assert ranks.wait() == [0, 0], ranks.text()
    # The cut was measured: another run could choose another one, and would then be another run.
    bounds = events(straight, "stages")[0]["bounds"][1:-1]

    config = write_config(
        tmp_path / "config.json",
        pipeline={"schedule": schedule, "partition": bounds},
        run={"epochs": EPOCHS, "eval_every": 10},
    )
    ranks = start_ranks(
        ["--ds_config", str(config), "--run_dir", str(stopped)], world_size=2, folder=tmp_path / "logs2"
    )
    wait_for_step(ranks, stopped, STOP_AFTER)
    ranks.processes[1].send_signal(number)  # one rank alone: all must stop behind the same step
    assert ranks.wait() == [EXIT_STOPPED] * 2, ranks.text()
    (stop,) = events(stopped, "stopped")
    assert stop["step"] % STEPS_PER_EPOCH or stop["step"] < EPOCHS * STEPS_PER_EPOCH
    log = ranks.logs[0].read_text()
    assert f"after step {stop['step']}, saved in {stopped}/checkpoint/step_" in log
    assert f"Go on with --resume {stopped}" in log

    # Without --ds_config: the run knows its own.
    ranks = start_ranks(["--resume", str(stopped)], world_size=2, folder=tmp_path / "logs3")
    assert ranks.wait() == [0, 0], ranks.text()
    (resumed,) = events(stopped, "resumed")
    assert resumed["step"] == stop["step"]
    assert resumed["notes"] == []
    assert f"resumed from step {stop['step']} of {EPOCHS * STEPS_PER_EPOCH}" in ranks.logs[0].read_text()
    assert_same_run(straight, stopped)


def test_resume_latest_starts_anew_goes_on_and_has_nothing_left_to_do(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", run={"epochs": 2, "checkpoint_every": 3})
    run_dir = tmp_path / "run"
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir), "--resume", "latest"]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs1")
    assert ranks.wait() == [0, 0], ranks.text()
    assert not events(run_dir, "resumed")
    assert sorted(item.name for item in (run_dir / "checkpoint").iterdir()) == [
        "latest", "step_00000015", "step_00000016",
    ]  # fmt: skip

    # More epochs, another number of stages and replicas, a damaged newest checkpoint: everything is said.
    file = run_dir / "checkpoint/step_00000016/layer_00-model_states.pt"
    file.write_bytes(file.read_bytes()[:-1])
    more = ["--set", "dsaux.run.epochs=3", "--set", "dsaux.pipeline.stages=1"]
    ranks = start_ranks([*arguments, *more], world_size=2, folder=tmp_path / "logs2")
    assert ranks.wait() == [0, 0], ranks.text()
    (resumed,) = events(run_dir, "resumed")
    assert resumed["step"] == 15
    text = " ".join(resumed["notes"])
    assert f"{file} has" in text
    assert "dealt anew (stages 2 to 1, replicas 1 to 2" in text
    assert "dsaux.run.epochs 2 to 3" in text
    assert [event["step"] for event in events(run_dir, "step")][-9:] == list(range(16, 25))
    assert json.loads((run_dir / "config.json").read_text())["dsaux"]["run"]["epochs"] == 3

    # Done: an evaluation is all that is left.
    ranks = start_ranks([*arguments, *more], world_size=2, folder=tmp_path / "logs3")
    assert ranks.wait() == [0, 0], ranks.text()
    assert events(run_dir, "final")[-1]["steps"] == 24


def test_a_run_in_progress_keeps_its_folder_until_it_is_killed(tmp_path: Path) -> None:
    run = {"epochs": 2000, "eval_every": 0, "checkpoint_every": 20, "keep": 1000}  # so that the evaluation's stays
    config = write_config(tmp_path / "config.json", run=run)
    run_dir = tmp_path / "run"
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir), "--resume", "latest"]
    first = start_ranks(arguments, world_size=2, folder=tmp_path / "logs1")
    try:
        wait_for_step(first, run_dir, 21)
        before = (run_dir / "config.json").read_bytes()
        second = start_ranks([*arguments, "--set", "dsaux.run.epochs=1"], world_size=2, folder=tmp_path / "logs2")
        assert second.wait() == [2, 2], second.text()
        for log in second.logs:
            (line,) = [line for line in log.read_text().splitlines() if "error:" in line]
            assert f"{run_dir} is in use: process {first.processes[0].pid} on {socket.gethostname()}" in line
        assert (run_dir / "config.json").read_bytes() == before
        evaluation = start_ranks(["--run_dir", str(run_dir), "--eval_only"], world_size=2, folder=tmp_path / "logs3")
        assert evaluation.wait() == [0, 0], evaluation.text()
        assert first.is_running(), first.text()
    finally:
        first.kill()
    third = start_ranks([*arguments, "--set", "dsaux.run.epochs=1"], world_size=2, folder=tmp_path / "logs4")
    assert third.wait() == [0, 0], third.text()
    assert len(events(run_dir, "resumed")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "{run}/nowhere"], "is not a folder. Give the folder of a run"),
        (["--resume", "{run}"], "holds no checkpoint"),
        (["--resume", ""], "--resume is empty"),
        (["--resume", "{run}", "--eval_only", "--run_dir", "{run}"], "Leave one of them out"),
    ],
)
def test_a_wrong_place_to_resume_from_is_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", pipeline={"stages": 1})
    (tmp_path / "run").mkdir()
    given = [argument.format(run=tmp_path / "run") for argument in arguments]
    ranks = start_ranks(["--ds_config", str(config), *given], world_size=1, folder=tmp_path / "logs")
    assert ranks.wait() == [2], ranks.text()
    (line,) = [line for line in ranks.logs[0].read_text().splitlines() if "error:" in line]
    assert words in line


@pytest.mark.parametrize("arguments", [["--resume", "nowhere"], ["--resume"], ["--eval_only", "--run_dir", "nowhere"]])
def test_without_a_configuration_the_run_must_have_one(arguments: list[str], tmp_path: Path) -> None:
    ranks = start_ranks(arguments, world_size=1, folder=tmp_path / "logs")
    assert ranks.wait() == [2], ranks.text()
    (line,) = [line for line in ranks.logs[0].read_text().splitlines() if "error:" in line]
    assert "is no run folder, or has no config.json in it. Give the folder of a run, or --ds_config" in line


@pytest.mark.parametrize(("key", "value"), [("epochs", 1), ("max_steps", 6)])
def test_the_end_of_a_run_that_is_resumed_says_what_to_raise(key: str, value: int, tmp_path: Path) -> None:
    pipeline, run_dir = {"stages": 1, "partition": "uniform"}, tmp_path / "run"
    config = write_config(tmp_path / "config.json", pipeline=pipeline, run={key: value})
    ranks = start_ranks(["--ds_config", str(config), "--run_dir", str(run_dir)], world_size=1, folder=tmp_path / "one")
    assert ranks.wait() == [0], ranks.text()
    assert "samples/s while training" in ranks.text()
    assert "nothing is left to train" not in ranks.text()

    again = start_ranks(["--resume", str(run_dir)], world_size=1, folder=tmp_path / "again")
    assert again.wait() == [0], again.text()
    (line,) = (line for line in again.text().splitlines() if "nothing is left to train" in line)
    assert f"Raise dsaux.run.{key} above {value}" in line
    assert "test accuracy" in again.text()
    for missing in ("samples/s while training", "peak memory"):  # nothing was trained, so it was not measured
        assert missing not in again.text()
