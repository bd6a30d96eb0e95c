"""A real run, exported in all formats: the file's network is the one that the engine has evaluated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_train import ROOT, TIME_LIMIT_S, environment, last, launch

pytestmark = pytest.mark.launch


def test_a_run_is_exported_in_all_formats_with_the_accuracy_that_the_engine_measured(tmp_path: Path) -> None:
    # Two replicas, and checkpoints between the evaluations.
    changes = {"run": {"epochs": 3, "max_steps": 20, "checkpoint_every": 12, "eval_every": 2}}
    _, events = launch(tmp_path, processes=4, gradient_accumulation_steps=2, dsaux=changes)
    for ending in ("pt", "safetensors", "onnx"):
        shown = export(tmp_path, "--out", str(tmp_path / f"model.{ending}"))
        assert "equal to the run's own evaluation" in shown, shown
        assert "equal scores" in shown or "scores equal to" in shown
    assert f"top-1 {last(events, 'final')['test_accuracy']:.4f}" in shown
    assert "resnet8 on photos, 20 steps" in shown

    between = export(tmp_path, "--out", str(tmp_path / "between.pt"), "--checkpoint", "step_00000012")
    assert "estimated anew on 2 batches" in between
    assert "no evaluation at this step is on record" in between

    again = export(tmp_path, "--out", str(tmp_path / "again.pt"), "--reestimate")
    assert "estimated anew" in again
    assert "equal to the run's own evaluation" in again, again


def export(folder: Path, *arguments: str) -> str:
    """Export `folder`/run; return the output. Fails unless the exit code is 0."""
    done = subprocess.run(
        [sys.executable, "-m", "dsaux.export", str(folder / "run"), *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "no word of the libraries' own"
    return done.stdout
