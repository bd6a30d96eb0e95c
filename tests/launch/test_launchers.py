"""Every launcher on this machine starts the same run: the losses of the first step agree. Wrong starts are refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.first_step import DEEPSPEED, PYTHON, TORCHRUN, first_loss, start
from tests.launch.small import write_config
from tests.launch.start import ROOT, TIME_LIMIT_S, start_ranks
from tests.ranks import free_port

HAS_MPI = shutil.which("mpirun") is not None
NO_MPI = "mpirun is not installed: pip install -e '.[mpi]'"
mpi = [pytest.mark.mpi, pytest.mark.skipif(not HAS_MPI, reason=NO_MPI)]
LAUNCHERS = {
    "deepspeed-2": (2, [*DEEPSPEED, "--num_gpus=2"]),
    "deepspeed-4": (4, [*DEEPSPEED, "--num_gpus=4"]),
    "torchrun-2": (2, [*TORCHRUN, "--nproc_per_node=2"]),
    "mpirun-2": (2, ["mpirun", "-n", "2", *PYTHON]),
    "mpirun-4": (4, ["mpirun", "-n", "4", *PYTHON]),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Loss of the first step in one process."""
    return first_loss(PYTHON, tmp_path_factory.mktemp("reference"), stages=1)


@pytest.mark.launch
@pytest.mark.parametrize(
    "launcher",
    [pytest.param(name, marks=mpi if name.startswith("mpirun") else []) for name in LAUNCHERS],
)
def test_every_launcher_gives_the_loss_of_one_process(launcher: str, tmp_path: Path, reference: float) -> None:
    """The same weights and images; only the sums of the layers may round otherwise (float32)."""
    stages, command = LAUNCHERS[launcher]
    if launcher.startswith("deepspeed"):
        command = [*command, f"--master_port={free_port()}"]  # its own is the same for every run of the machine
    assert first_loss(command, tmp_path, stages=stages) == pytest.approx(reference, rel=1e-5)


@pytest.mark.mpi
@pytest.mark.skipif(not HAS_MPI, reason=NO_MPI)
def test_another_count_than_the_stages_is_refused_under_mpirun(tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json")
    done = start(["mpirun", "-n", "3", *PYTHON], "--ds_config", str(config))
    assert done.returncode != 0
    assert "dsaux.pipeline.stages is 2 but 3 processes were started" in done.stdout


@pytest.mark.mpi
@pytest.mark.skipif(not HAS_MPI, reason=NO_MPI)
@pytest.mark.parametrize("threads", [0, 1])
def test_processes_that_end_one_after_the_other_are_no_failure_under_mpirun(tmp_path: Path, threads: int) -> None:
    """mpirun kills those that are left when one ends without a word."""
    script = tmp_path / "end.py"
    script.write_text(f"""
import threading, time
import torch
from dsaux.runtime import Place, run_and_exit

def spin():
    while True:
        torch.zeros(64, 64) @ torch.zeros(64, 64)

def main():
    place = Place.from_environment()
    for _ in range({threads}):
        threading.Thread(target=spin, daemon=True).start()
    time.sleep(0.5 * place.rank)
    print("done", place.rank)

run_and_exit(main)
""")
    done = subprocess.run(
        ["mpirun", "-n", "3", sys.executable, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == ["done 0", "done 1", "done 2"]


@pytest.mark.mpi
@pytest.mark.skipif(not HAS_MPI, reason=NO_MPI)
def test_a_torchrun_in_every_process_of_mpirun_is_refused() -> None:
    done = start(["mpirun", "-n", "2", *TORCHRUN, "--nproc_per_node=1"], "--ds_config", "none.json")
    assert done.returncode != 0
    assert "two launchers at once: mpirun started 2 tasks" in done.stdout


@pytest.mark.mpi
@pytest.mark.skipif(not HAS_MPI, reason=NO_MPI)
def test_an_mpi_that_is_not_mpiruns_is_refused() -> None:
    """The variables say two processes, but MPI, which no mpirun has started, sees one."""
    variables = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    variables |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    done = start(PYTHON, "--ds_config", "none.json", **variables)
    assert done.returncode == 2, done.stdout
    assert "mpirun started 2 processes but mpi4py sees 1" in done.stdout


@pytest.mark.launch
def test_a_port_in_use_is_named_on_every_rank(tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json", pipeline={"partition": "uniform"}, run={"timeout_s": 10})
    with socket.socket() as other:  # a program that takes connections and answers nobody
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = start_ranks(
            ["--ds_config", str(config), "--run_dir", str(tmp_path / "run")],
            world_size=2,
            folder=tmp_path / "logs",
            MASTER_PORT=port,
        )
        codes = ranks.wait()
    assert codes == [2, 2], ranks.text()
    first, second = (log.read_text().strip().splitlines()[-1] for log in ranks.logs)
    assert f"MASTER_PORT {port} is in use" in first
    assert f"MASTER_ADDR:MASTER_PORT 127.0.0.1:{port} within dsaux.run.timeout_s 10" in second


@pytest.mark.launch
def test_a_rank_0_that_never_comes_is_named_within_the_timeout(tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json", pipeline={"partition": "uniform"}, run={"timeout_s": 5})
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = start(PYTHON, "--ds_config", str(config), **variables, MASTER_PORT=str(free_port()))
    assert done.returncode == 2, done.stdout
    assert "the processes did not come together at MASTER_ADDR:MASTER_PORT 127.0.0.1" in done.stdout.splitlines()[-1]


@pytest.mark.launch
def test_a_rank_that_never_comes_is_named_by_rank_0(tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json", pipeline={"partition": "uniform"}, run={"timeout_s": 5})
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    run_dir = tmp_path / "run"
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir)]
    done = start(PYTHON, *arguments, **variables, MASTER_PORT=str(free_port()))
    assert done.returncode != 0
    said = "rank 1 did not come" in done.stdout or "only 1 of 2 processes met" in done.stdout
    assert said, f"whoever notices first, the watch or the store: {done.stdout}"
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "failed"
