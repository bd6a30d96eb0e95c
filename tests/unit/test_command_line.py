"""What train.py says about a command line that starts nothing: who asked for what, and what to write instead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import train
from dsaux.config import ConfigError, check_launch, load_config
from dsaux.runtime import Place

QUICKSTART = Path(__file__).resolve().parents[2] / "ds_configs" / "quickstart.json"
ALONE = Place(rank=0, local_rank=0, world_size=1, local_world_size=1, host="here")


def said(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The error of a command line that train.py refuses."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(ConfigError) as caught:
        train.parse_arguments()
    return str(caught.value)


def test_a_dry_run_says_that_it_was_asked_for_the_processes() -> None:
    with pytest.raises(ConfigError) as caught:
        train.show_dry_run(load_config(QUICKSTART), ALONE, processes=3)
    assert str(caught.value) == (
        "dsaux.pipeline.stages is 2 but --dry_run 3 asks for 3 processes; it must divide them. Ask for 2, 4 or 6, or "
        "change stages."
    )


@pytest.mark.parametrize("given", ["-2", "0", "many", "1.5"])
def test_a_dry_run_for_no_number_of_processes_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = said(monkeypatch, "--ds_config", str(QUICKSTART), "--dry_run", given)
    assert f"--dry_run is {given}; it must be a whole number >= 1" in line


def test_a_dry_run_without_a_number_is_one_of_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--ds_config", str(QUICKSTART), "--dry_run"])
    assert train.parse_arguments().dry_run == 0


@pytest.mark.parametrize("stages", [2, 5])
def test_a_single_process_for_several_stages_is_told_of_a_launcher(stages: int) -> None:
    config = load_config(QUICKSTART, overrides=[f"dsaux.pipeline.stages={stages}"])
    with pytest.raises(ConfigError, match=f"such as deepspeed --num_gpus {stages} train.py"):
        check_launch(config, world_size=1)


def test_the_run_of_a_folder_is_told_how_it_goes_without_a_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(monkeypatch, "--run_dir", "r1")
    assert "--ds_config is missing" in line
    assert "--resume, or --run_dir with --eval_only" in line
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.parse_arguments()
    assert "--resume, or --run_dir with --eval_only" in " ".join(capsys.readouterr().out.split())
