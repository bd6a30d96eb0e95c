"""train.py as a user starts it: the deepspeed launcher, real ranks, a small network, the folder that is left."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import free_port

pytestmark = pytest.mark.launch

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHER = Path(sys.executable).parent / "deepspeed"
TIME_LIMIT_S = 300  # the first start on a machine compiles an operation of DeepSpeed's
CHANCE = 1 / 18

SMALL: dict[str, Any] = {
    "train_batch_size": 64,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "gradient_clipping": 5.0,
    "dsaux": {
        "model": {"name": "resnet8"},
        "data": {"train_samples": 512, "test_samples": 180, "image_size": 16},
        "pipeline": {"stages": 2, "partition": ["group2.block1"]},
        "run": {"name": "small", "epochs": 3, "log_every": 4, "bn_batches": 2, "eval_batch_size": 64},
    },
}
FINAL_KEYS = {
    "method", "stages", "replicas", "epochs", "test_accuracy", "test_samples", "train_samples_per_s", "wall_s",
    "boundary_mismatch", "peak_memory_bytes", "seed",
}  # fmt: skip


def write_config(folder: Path, **changes: Any) -> Path:
    """A small configuration; "dsaux" is merged block by block."""
    document = json.loads(json.dumps(SMALL))
    for block, values in changes.pop("dsaux", {}).items():
        document["dsaux"][block].update(values)
    document.update(changes)
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return path


def launch(folder: Path, *arguments: str, processes: int = 2, **changes: Any) -> tuple[str, list[dict[str, Any]]]:
    """Train in `folder`/run; return the output and the events. Fails unless the exit code is 0."""
    config = write_config(folder, **changes)
    command = [LAUNCHER, "--num_gpus", str(processes), "--master_port", str(free_port()), "train.py"]
    done = subprocess.run(
        [*map(str, command), "--ds_config", str(config), "--run_dir", str(folder / "run"), *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr, events(folder / "run")


def environment() -> dict[str, str]:
    """This process's environment without what a test run may have set for ranks of its own."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in ours}


def events(run: Path) -> list[dict[str, Any]]:
    """What the run wrote, every line of it valid JSON."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The last event of a kind."""
    return [event for event in found if event["event"] == kind][-1]


def test_two_stages_train_evaluate_and_can_be_evaluated_again(tmp_path: Path) -> None:
    output, found = launch(tmp_path)
    final = last(found, "final")
    assert set(final) >= FINAL_KEYS
    assert final["method"] == "penalty"
    assert (final["stages"], final["replicas"], final["epochs"], final["steps"]) == (2, 1, 3, 24)
    assert (final["test_samples"], final["bounds"]) == (180, [0, 2, 5])
    assert final["test_accuracy"] > 2 * CHANCE
    assert len(final["boundary_mismatch"]) == 1
    assert len(final["peak_memory_bytes"]) == 2
    assert [event["step"] for event in found if event["event"] == "step"] == [4, 8, 12, 16, 20, 24]
    assert len([event for event in found if event["event"] == "eval"]) == 3
    assert "\x1b" not in output, "no escape codes where there is no terminal"
    assert "test accuracy" in output
    assert re.search(r"0 .* stem \.\. group1\.block1 .*\n.*1 .* group2\.block1 \.\. head", output), "the stage map"
    effective = json.loads((tmp_path / "run/config.json").read_text())
    assert effective["dsaux"]["aux"]["beta"] == 10.0
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2

    # The saved network, cut elsewhere and without an AuxNet, has the same accuracy.
    changes = {"pipeline": {"stages": 3, "partition": "uniform"}}
    _, found = launch(tmp_path, "--eval_only", processes=3, dsaux=changes)
    again = last(found, "eval")
    assert again["top1"] == final["test_accuracy"]
    assert again["loss"] == pytest.approx(final["test_loss"], rel=1e-4)


def test_uneven_stages_with_replicas_and_every_option_of_deepspeed(tmp_path: Path) -> None:
    output, found = launch(
        tmp_path,
        processes=4,
        gradient_accumulation_steps=2,
        bf16={"enabled": True},
        zero_optimization={"stage": 1},
        zero_allow_untested_optimizer=True,
        wall_clock_breakdown=True,
        pipeline={"activation_checkpoint_interval": 1},
        csv_monitor={"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "small"},
        tensorboard={"enabled": True, "output_path": str(tmp_path / "board"), "job_name": "small"},
        dsaux={"pipeline": {"partition": [1]}, "data": {"loader": "torch"}, "run": {"max_steps": 12}},
    )
    final = last(found, "final")
    assert (final["stages"], final["replicas"], final["steps"], final["bounds"]) == (2, 2, 12, [0, 1, 5])
    assert final["test_samples"] == 180
    assert all(event["loss"] is not None for event in found if event["event"] == "step")
    assert "aux_forward" in output, "wall_clock_breakdown shows the AuxNet's timers"
    (losses,) = (tmp_path / "csv").rglob("*train_loss*.csv")
    rows = list(csv.reader(losses.open()))
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    assert len(rows) > 1
    assert all(float(row[1]) > 0 for row in rows[1:])


def test_a_run_ends_with_exact_epochs_and_four_stages_hold_one_layer_each(tmp_path: Path) -> None:
    _, found = launch(
        tmp_path,
        processes=4,
        gradient_accumulation_steps=2,
        dsaux={
            "pipeline": {"stages": 4, "partition": [1, 2, 3]},
            "run": {"exact_epochs": 1, "exact_lr": 0.02, "epochs": 3, "max_steps": 20},
        },
    )
    final = last(found, "final")
    assert final["method"] == "penalty+1f1b"
    phases = [(event["step"], event["phase"]) for event in found if event["event"] == "step"]
    assert phases == [(4, "penalty"), (8, "penalty"), (12, "penalty"), (16, "penalty"), (20, "1f1b")]
    assert last(found, "exact")["step"] == 16
    rates = [event["learning_rate"] for event in found if event["event"] == "step"]
    assert rates[0] == 0.1
    assert rates[-1] < 0.02


def test_local_trains_two_stages_and_evaluates(tmp_path: Path) -> None:
    output, found = launch(tmp_path, "--set", "dsaux.pipeline.schedule=local", "--set", "dsaux.aux.beta=3")
    final = last(found, "final")
    assert (final["method"], final["stages"], final["steps"]) == ("local", 2, 24)
    assert final["test_accuracy"] > 2 * CHANCE
    assert final["boundary_mismatch"] == final["boundary_adjoint"] == []
    steps = [event for event in found if event["event"] == "step"]
    assert all(event["boundary_mismatch"] == [] and event["loss"] is not None for event in steps)
    assert all(None not in event["stage_loss"] for event in steps), "every stage has a loss of its own"
    assert steps[-1]["stage_loss"][0] < steps[0]["stage_loss"][0], "the first stage learns behind its own head"
    assert "nan" not in output.lower().replace("dsaux.run.nan", "")
    assert "dsaux.aux.beta is 3" in last(found, "warning")["text"]


def test_al_trains_three_stages_and_ends_with_exact_epochs(tmp_path: Path) -> None:
    _, found = launch(
        tmp_path,
        processes=3,
        gradient_accumulation_steps=2,
        csv_monitor={"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "small"},
        dsaux={
            "pipeline": {"stages": 3, "partition": [1, 3], "schedule": "al"},
            "run": {"exact_epochs": 1, "exact_lr": 0.02, "epochs": 4, "log_every": 2, "eval_every": 2},
        },
    )
    final = last(found, "final")
    assert (final["method"], final["steps"], final["exact_epochs"]) == ("al+1f1b", 32, 1)
    assert final["test_accuracy"] > 2 * CHANCE
    assert len(final["wait_share"]) == 3
    assert all(0.0 <= share < 1.0 for share in final["wait_share"])
    assert len(final["boundary_adjoint"]) == 2
    assert all(ratio > 0.0 for ratio in final["boundary_adjoint"])
    first, *steps = [event for event in found if event["event"] == "step"]
    assert first["boundary_mismatch"][0] is None, "stage 0 has had no batch yet after two steps"
    assert [event["phase"] for event in steps] == ["al"] * 11 + ["1f1b"] * 4
    assert all(None not in event["boundary_mismatch"] for event in steps)
    assert last(found, "exact")["step"] == 24
    (losses,) = (tmp_path / "csv").rglob("*train_loss*.csv")
    counts = [int(float(row[0])) for row in list(csv.reader(losses.open()))[1:]]
    assert counts == [64 * (step + 1) for step in range(32)], "monitors count the samples that have entered"


@pytest.mark.parametrize("stages", [1, 3])
def test_the_exact_twin_trains(tmp_path: Path, stages: int) -> None:
    changes = {"pipeline": {"stages": stages, "schedule": "1f1b", "partition": "time"}, "run": {"max_steps": 10}}
    _, found = launch(tmp_path, processes=stages, gradient_accumulation_steps=2, dsaux=changes)
    final = last(found, "final")
    assert (final["method"], final["stages"], final["boundary_mismatch"]) == ("1f1b", stages, [])


def test_plain_python_trains_in_one_process(tmp_path: Path) -> None:
    config = write_config(tmp_path, dsaux={"pipeline": {"stages": 1, "partition": "time"}, "run": {"max_steps": 4}})
    command = [sys.executable, "train.py", "--ds_config", str(config), "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert last(events(tmp_path / "run"), "final")["stages"] == 1


def test_a_killed_rank_ends_the_others_under_the_launcher(tmp_path: Path) -> None:
    config = write_config(tmp_path, dsaux={"run": {"epochs": 10_000}})
    command = [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port()), "train.py", "--ds_config", str(config)]
    process = subprocess.Popen(
        [*map(str, command), "--run_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment(),
        stdout=(tmp_path / "output").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for_steps(tmp_path / "run", process)
        ranks = [int(pid) for pid in re.findall(r"process (\d+) spawned", (tmp_path / "output").read_text())]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    finally:
        process.kill()
        process.wait()


def test_a_killed_rank_ends_the_others_without_a_launcher(tmp_path: Path) -> None:
    config = write_config(tmp_path, dsaux={"run": {"epochs": 10_000}})
    port = str(free_port())
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "train.py", "--ds_config", str(config), "--run_dir", str(tmp_path / "run")],
                cwd=ROOT,
                env={**environment(), **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=(tmp_path / f"output{rank}").open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    try:
        wait_for_steps(tmp_path / "run", ranks[0])
        ranks[1].kill()
        assert ranks[0].wait(timeout=60) == 1
        assert "[rank 0 on " in (tmp_path / "output0").read_text().splitlines()[-1]
        assert last(events(tmp_path / "run"), "failed")["error"]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def wait_for_steps(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when the run has logged a step; fail if it ends or takes too long."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before its first step"
        if (run / "metrics.jsonl").exists() and any(event["event"] == "step" for event in events(run)):
            return
        time.sleep(0.2)
    raise AssertionError("no step within the time limit")


@pytest.mark.parametrize("schedule", ["al", "local"])
def test_a_network_without_batchnorm_trains_on_single_samples(schedule: str, tmp_path: Path) -> None:
    _, found = launch(
        tmp_path,
        train_batch_size=4,
        train_micro_batch_size_per_gpu=1,
        dsaux={
            "model": {"name": "examples/gpt.py:gpt", "args": {"layers": 2, "heads": 2, "dim": 16}},
            "data": {"name": "text", "loader": "torch", "context": 8, "train_samples": 64, "image_size": None},
            "pipeline": {"partition": [1], "schedule": schedule},
        },
    )
    assert last(found, "final")["steps"] == 48
    assert all(event["loss"] is not None for event in found if event["event"] == "step")
