"""The README says what is true: its commands exist, its example is code that runs, its tables come from their data."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsaux.config import load_config

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402 - a script, found beside the other benchmarks


def row(accuracy: float, *, seed: int, speed: float = 200.0) -> dict[str, Any]:
    final = {
        "test_accuracy": accuracy,
        "train_samples_per_s": speed,
        "stages": 2,
        "method": "penalty",
        "bounds": [0, 4, 11],
        "boundary_mismatch": [0.02],
        "seed": seed,
    }
    environment = {
        "cores": 2,
        "cpu": "a processor",
        "gpus": [],
        "versions": {"torch": "1", "deepspeed": "2", "dali": None},
        "started_utc": "2026-01-02T03:04:05+00:00",
    }
    return {
        "suite": "s",
        "case": "c",
        "num_processes": 2,
        "command_wall_s": 100.0,
        "final": final,
        "environment": environment,
    }


def test_the_table_has_mean_range_and_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "seeds.jsonl"
    rows = [row(0.8, seed=0), row(0.9, seed=1, speed=220.0)]
    path.write_text("\n".join(json.dumps(one) for one in rows))
    monkeypatch.setattr(report, "SEEDS", path)
    monkeypatch.setattr(report, "SEEDS_SUITES", ("s",))
    table = report.seeds_table()
    assert "| s | 2 | [4] | `penalty` | 0.850 (0.800 to 0.900) | 2 | 210 (200 to 220) | 100 s | 0.020 |" in table
    assert "Seeds 0, 1; 2 cores of a processor, no GPU" in table


def test_a_table_goes_between_its_markers() -> None:
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert report.between_markers(text, name="x", table="new") == "a\n<!-- begin x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match=r"README\.md lacks the markers"):
        report.between_markers(text, name="y", table="new")


def test_the_tables_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_place_is_left_to_be_filled_in() -> None:
    assert "@@" not in README


def test_every_link_leads_to_a_file() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("command", re.findall(r"^.*train\.py --ds_config.*$", README, flags=re.MULTILINE))
def test_every_training_command_has_a_valid_configuration(command: str) -> None:
    words = shlex.split(command.partition("train.py")[2].replace("`", " "), comments=True)
    sets = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    if words[1] != "ds_configs/NAME.json":
        load_config(ROOT / words[1], overrides=sets)


def test_the_example_builds_a_module_for_the_cut_it_names() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    before_module, starts, _ = example.partition("share_cores(")  # there the processes come together
    assert starts, "tests/launch/test_readme_script.py runs the whole of it"
    names: dict[str, Any] = {}
    exec(before_module.replace("import dsaux\n", ""), names)
    aux = names["build_aux_net"]([(3, 32, 32), names["after"][4]])
    assert aux.num_boundaries == 1
    assert "bounds=[0, 5, 11]" in example
    assert len(names["layers"]) == 11
