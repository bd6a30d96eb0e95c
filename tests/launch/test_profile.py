"""A run with `dsaux.run.profile_steps`, as a user starts it, and the table of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.small import write_config
from tests.launch.start import ROOT, events, start_ranks

pytestmark = pytest.mark.launch


def test_a_run_leaves_a_profile_that_the_command_shows(tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json", run={"profile_steps": 3, "epochs": 2}, pipeline={"schedule": "al"})
    run_dir = tmp_path / "run"
    ranks = start_ranks(["--ds_config", str(config), "--run_dir", str(run_dir)], world_size=2, folder=tmp_path / "logs")
    assert ranks.wait() == [0, 0], ranks.text()
    assert f"python -m dsaux.profile {run_dir}" in ranks.text()
    (event,) = events(run_dir, "profile")
    assert event["folder"] == str(run_dir / "profile")

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dsaux.profile", str(run_dir), *arguments],
            cwd=ROOT,
            env={**os.environ},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    rows = [line.split()[:2] for line in command().splitlines()]
    assert ["0", "0"] in rows
    assert ["1", "1"] in rows
    found = json.loads(command("--json"))
    assert [len(rank["timed_steps"]) for rank in found["ranks"]] == [3, 3]
    assert found["eq27"]["by_terms"] > 0
    assert [Path(path).is_file() for path in found["traces"].values()] == [True, True]
