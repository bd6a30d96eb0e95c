"""The start scripts in launchers/: whose folder a path is seen from, and that wrong variables start nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHERS = ROOT / "launchers"
QUICKSTART = ROOT / "ds_configs" / "quickstart.json"
TOOLS = ("deepspeed", "mpirun", "torchrun", "python", "srun")
SHELL_SCRIPTS = ("cpu.sh", "local.sh", "mpi.sh", "one_gpu.sh", "torchrun.sh")


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """A folder of the user's, beside which stand tools that write down how they were called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$0" "$@" >> {tmp_path}/called\n')
        (tools / name).chmod(0o755)
    folder = tmp_path / "away"
    folder.mkdir()
    return folder


def start(script: str, *arguments: str, away: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call a script in the user's folder, outside of any job."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PATH": f"{away.parent / 'bin'}:{os.environ['PATH']}", "GPUS": "1", "PROCESSES": "1"}
    environment |= variables
    command = [LAUNCHERS / script, *arguments]
    return subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True, timeout=60)


def called(away: Path) -> list[str]:
    """Words of the calls of tools; none where nothing was started."""
    path = away.parent / "called"
    return path.read_text().splitlines() if path.exists() else []


def value_of(option: str, words: list[str]) -> Path:
    """The word behind an option."""
    return Path(words[words.index(option) + 1])


def refused(done: subprocess.CompletedProcess[str], *, away: Path) -> str:
    """The one line of a start that was refused before anything was started."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert called(away) == []
    assert list(away.iterdir()) == []
    [line] = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_the_configuration_is_one_of_the_callers_folder(script: str, away: Path) -> None:
    (away / "my net.json").touch()
    done = start(script, away=away, DS_CONFIG="my net.json")
    assert done.returncode == 0, done.stderr
    assert value_of("--ds_config", called(away)) == away / "my net.json"


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_without_one_it_is_the_repositorys_quickstart(script: str, away: Path) -> None:
    done = start(script, away=away)
    assert done.returncode == 0, done.stderr
    assert (ROOT / value_of("--ds_config", called(away))).samefile(QUICKSTART)


@pytest.mark.parametrize(("script", "option"), [("local.sh", "--hostfile"), ("mpi.sh", "-hostfile")])
def test_the_list_of_hosts_is_one_of_the_callers_folder(script: str, option: str, away: Path) -> None:
    (away / "hosts").write_text("node1 slots=8\n")
    done = start(script, away=away, HOSTFILE="hosts")
    assert done.returncode == 0, done.stderr
    assert value_of(option, called(away)) == away / "hosts"


@pytest.mark.parametrize("script", ["local.sh", "mpi.sh"])
@pytest.mark.parametrize("path", ["hosts", "/nope.hosts", "."])
def test_a_list_of_hosts_that_is_missing_starts_nothing(script: str, path: str, away: Path) -> None:
    line = refused(start(script, "--dry_run", away=away, HOSTFILE=path), away=away)
    assert line.startswith(f"{script}: HOSTFILE is '{path}'")
    assert str(away) in line


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_a_configuration_that_is_missing_starts_nothing(script: str, away: Path) -> None:
    line = refused(start(script, away=away, DS_CONFIG="my_net.json"), away=away)
    assert line.startswith(f"{script}: DS_CONFIG is 'my_net.json'")
    assert str(away) in line


@pytest.mark.parametrize("value", ["x", "0", "1.5"])
@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("cpu.sh", "PROCESSES"),
        ("cpu.sh", "MASTER_PORT"),
        ("local.sh", "GPUS"),
        ("local.sh", "MASTER_PORT"),
        ("mpi.sh", "PROCESSES"),
        ("one_gpu.sh", "PROCESSES"),
        ("one_gpu.sh", "MASTER_PORT"),
        ("torchrun.sh", "PROCESSES"),
        ("torchrun.sh", "NODES"),
        ("torchrun.sh", "MASTER_PORT"),
    ],
)
def test_what_is_no_count_starts_nothing(script: str, name: str, value: str, away: Path) -> None:
    line = refused(start(script, away=away, **{name: value}), away=away)
    assert line == f"{script}: {name} is '{value}'; it must be a whole number >= 1. Change it, or leave it out."


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_array_seeds.sbatch"])
def test_a_batch_script_that_is_no_job_starts_nothing(script: str, away: Path) -> None:
    line = refused(start(script, away=away, PROJECT=str(away)), away=away)
    assert "no job of Slurm's. Submit it: sbatch " in line
    assert line.endswith(f"launchers/{script}")


@pytest.mark.parametrize("folder", ["away", "project"])
def test_a_job_takes_a_configuration_of_the_folder_where_it_was_submitted_or_of_the_project(
    folder: str, away: Path
) -> None:
    project = away.parent / "project"
    project.mkdir()
    (away.parent / folder / "my_net.json").touch()
    done = start("slurm.sbatch", away=away, DS_CONFIG="my_net.json", PROJECT=str(project), SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    assert (project / value_of("--ds_config", called(away))).samefile(away.parent / folder / "my_net.json")


def test_a_job_without_its_configuration_starts_nothing(away: Path) -> None:
    done = start("slurm.sbatch", away=away, DS_CONFIG="my_net.json", PROJECT=str(ROOT), SLURM_JOB_ID="7")
    assert "DS_CONFIG is 'my_net.json'" in refused(done, away=away)
