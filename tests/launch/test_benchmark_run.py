"""benchmarks/run.py as a user starts it: its smallest case runs, wrong arguments are refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.start import ROOT, TIME_LIMIT_S

pytestmark = pytest.mark.launch
RUN = [sys.executable, str(ROOT / "benchmarks/run.py")]
KEYS = {
    "suite",
    "case",
    "contestant",
    "stages",
    "micro_batches",
    "global_batch",
    "samples_per_s",
    "idle_share",
    "bytes_per_step",
    "peak_memory_bytes",
    "n",
    "spread",
    "environment",
}


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=TIME_LIMIT_S)


def test_the_smallest_case_measures_every_contestant_and_keeps_a_line_for_each(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    done = start("--suite", "sleep", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    names = {row["contestant"] for row in rows}
    assert {"deepspeed-1f1b", "dsaux-penalty", "dsaux-al"} <= names
    for row in rows:
        assert row["failed"] is None
        assert set(row) >= KEYS
        assert row["samples_per_s"] > 0.0
        assert 0.0 <= row["idle_share"] < 1.0
        assert row["spread"][0] <= row["samples_per_s"] <= row["spread"][1]
        assert row["bytes_per_step"] > 0, "something crosses a boundary under every contestant of this case"
        assert row["contestant"] in done.stdout


def test_a_case_that_is_not_there_is_refused_with_those_that_are() -> None:
    done = start("--suite", "compute", "--case", "vgg16")
    assert done.returncode == 2
    assert 'no case has vgg16 in its name; there are "resnet56, batch 64, K=2"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_suite_that_is_not_there_is_refused() -> None:
    done = start("--suite", "speed")
    assert done.returncode == 2
    assert "invalid choice: 'speed'" in done.stderr
