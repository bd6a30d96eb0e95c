"""train.py as a job of a real Slurm of two nodes: training, stop and requeue, and what is refused.

tests/slurm/install.sh installs Slurm; without it these tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.first_step import PYTHON, first_loss
from tests.launch.small import write_config
from tests.launch.start import ROOT, events
from tests.slurm.cluster import Cluster, running_cluster, wait_until, why_not

pytestmark = pytest.mark.slurm

LIMIT_S = 300.0
STEPS = 160
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Started once for all tests of this file."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running_cluster() as started:
        yield started


def texts(folder: Path) -> str:
    """All logs of a folder."""
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in sorted(folder.glob("*.log")))


def start_soon(cluster: Cluster, job: str) -> None:
    """Cut the two minutes short that Slurm lets a requeued job wait.

    Not to nothing: the nodes revoke the job's former start to the second, and refuse one within that second as "already
    killed", which ends the job as failed.
    """
    wait_until(lambda: cluster.job(job)["JobState"] != "COMPLETING", limit_s=LIMIT_S, what="its nodes are free")
    if cluster.job(job)["JobState"] == "PENDING":
        cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def test_a_job_over_two_nodes_saves_itself_is_requeued_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "small.json", pipeline={"partition": "uniform"}, run={"epochs": 20, "eval_every": 0}
    )
    run_dir, logs = tmp_path / "run", tmp_path / "logs"
    variables = {"DS_CONFIG": str(config), "RUN_DIR": str(run_dir), "LOG_DIR": str(logs), "PROJECT": str(ROOT), **CPU}
    options = (*TWO_NODES, "--parsable", f"--output={tmp_path / 'job.log'}")
    job = cluster.call("sbatch", *options, str(ROOT / "launchers/slurm.sbatch"), **variables)

    def story() -> str:
        return f"{cluster.job(job)}\n{(tmp_path / 'job.log').read_text()}\n{texts(logs)}"

    try:
        wait_until(lambda: len(events(run_dir, "step")) >= 3, limit_s=LIMIT_S, what="three steps", period_s=0.05)
        cluster.call("scancel", "--signal=TERM", job)
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", limit_s=LIMIT_S, what="the job is requeued")
        saved = events(run_dir, "checkpoint")[-1]["step"]
        start_soon(cluster, job)
        wait_until(lambda: bool(events(run_dir, "final")), limit_s=LIMIT_S, what="the end of the run")
        wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", limit_s=LIMIT_S, what="the end of the job")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{story()}") from None
    assert 3 <= saved < STEPS, "it was stopped on the way"
    lines = events(run_dir)
    resumed = next(number for number, event in enumerate(lines) if event["event"] == "resumed")
    assert lines[resumed]["step"] == saved
    later = [event["step"] for event in lines[resumed:] if event["event"] == "step"]
    assert later == list(range(saved + 1, STEPS + 1))
    table = events(run_dir, "stages")[0]["rows"]
    assert [(row["rank"], row["stage"]) for row in table] == [(0, 0), (1, 1)]
    assert {log.name for log in logs.iterdir()} == {"rank_0.log", "rank_1.log"}
    assert "it has saved itself" in (tmp_path / "job.log").read_text()


def test_the_time_limits_signal_requeues_a_job_and_cancelling_does_not(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json", pipeline={"partition": "uniform"}, run={"epochs": 1000})
    run_dir = tmp_path / "run"
    variables = {
        "DS_CONFIG": str(config),
        "RUN_DIR": str(run_dir),
        "LOG_DIR": str(tmp_path),
        "PROJECT": str(ROOT),
        **CPU,
    }
    options = (*TWO_NODES, "--parsable", f"--output={tmp_path / 'job.log'}")
    job = cluster.call("sbatch", *options, str(ROOT / "launchers/slurm.sbatch"), **variables)
    try:
        wait_until(lambda: len(events(run_dir, "step")) >= 3, limit_s=LIMIT_S, what="three steps")
        cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does before the limit
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", limit_s=LIMIT_S, what="the job is requeued")
        start_soon(cluster, job)
        wait_until(lambda: bool(events(run_dir, "resumed")), limit_s=LIMIT_S, what="the run goes on")
        cluster.call("scancel", job)
        wait_until(lambda: cluster.job(job)["JobState"] == "CANCELLED", limit_s=LIMIT_S, what="the job is cancelled")
        wait_until(lambda: not cluster.call("squeue", "--noheader"), limit_s=LIMIT_S, what="the queue is empty")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.job(job)}\n{texts(tmp_path)}") from None
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "1"


def test_srun_alone_gives_the_loss_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    """The same weights and images; only the sums of the layers may round otherwise (float32)."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    srun = ["srun", *TWO_NODES, "--quiet", *PYTHON]
    found = first_loss(srun, tmp_path / "two", stages=2, base=cluster.environment())
    assert found == pytest.approx(first_loss(PYTHON, tmp_path / "one", stages=1), rel=1e-5)


def test_a_configuration_writes_its_own_job(cluster: Cluster, tmp_path: Path) -> None:
    config, script = write_config(tmp_path / "small.json"), tmp_path / "job.sbatch"
    options = ["--nodes=2", "--gpus_per_node=0", "--cpus_per_task=1", f"--ds_config={config}", f"--out={script}"]
    done = subprocess.run([sys.executable, "-m", "dsaux.launch", "slurm", *options], cwd=ROOT, timeout=LIMIT_S)
    assert done.returncode == 0
    cluster.call("sbatch", "--test-only", str(script))


def test_plain_python_in_a_job_for_two_tasks_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    script, log = tmp_path / "job.sh", tmp_path / "job.log"
    script.write_text(f"#!/bin/bash\n{sys.executable} {ROOT / 'train.py'} --ds_config none.json\n")
    done = subprocess.run(
        ["sbatch", "--wait", *TWO_NODES, f"--output={log}", script],
        env=cluster.environment(**CPU),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2, done.stderr
    assert (
        "a job of Slurm's for 2 tasks (SLURM_NTASKS), but train.py was started as a single process" in log.read_text()
    )


def test_a_torchrun_in_every_task_is_refused_by_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]  # of one host, in each task
    command = ["srun", *TWO_NODES, *torchrun, str(ROOT / "train.py"), "--ds_config=none.json"]
    done = subprocess.run(
        command, env=cluster.environment(**CPU), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode != 0
    assert done.stderr.count("two launchers at once: srun started 2 tasks") == 2, done.stderr


def test_another_number_of_tasks_than_stages_is_refused_by_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json")
    command = ["srun", "--nodes=2", "--ntasks=3", "--gres=none", sys.executable, "train.py", f"--ds_config={config}"]
    done = subprocess.run(
        command, env=cluster.environment(**CPU), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 2, done.stderr
    for rank in range(3):
        assert f"[rank {rank} on" in done.stderr
    assert done.stderr.count("dsaux.pipeline.stages is 2 but 3 processes were started") == 3
