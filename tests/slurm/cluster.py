"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd on loopback, everything below one folder.

    munged (own key, own socket) <--- slurmctld <--- sbatch, srun, scancel with SLURM_CONF
                                        |      |
                                   slurmd n1  slurmd n2      one host, two ports

The daemons are children of the test and are ended by their process ids; so is whatever a job has left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0
CONF = """\
ClusterName=dsaux
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): run tests/slurm/install.sh as root"
    return None if os.geteuid() == 0 else "the daemons of Slurm need root"


def search_path() -> str:
    """PATH with the folders of the daemons."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: configuration, state and logs.
        daemons: what was started, in order.
    """

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def environment(self, **variables: str) -> dict[str, str]:
        """For Slurm's commands: this process's, without a Slurm that it may run under."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        return {**own, "PATH": search_path(), "SLURM_CONF": str(self.folder / "slurm.conf"), **variables}

    def call(self, *command: str, limit_s: float = 60.0, cwd: Path | None = None, **variables: str) -> str:
        """Output of one of Slurm's commands.

        Raises:
            AssertionError: if it fails.
        """
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=self.environment(**variables), cwd=cwd
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, by its names."""
        text = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def logs(self) -> str:
        """The end of every daemon's log."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def stop(self) -> None:
        """End the jobs and then the daemons."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.call("scancel", "--full", "--signal=KILL", "--user=root")
            self.call("scancel", "--user=root")
            wait_until(lambda: not self.call("squeue", "--noheader"), limit_s=STOP_LIMIT_S, what="the queue is empty")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def wait_until(is_so: Callable[[], bool], *, limit_s: float, what: str, period_s: float = 0.5) -> None:
    """Ask again and again.

    Raises:
        AssertionError: if it is not so at the limit.
    """
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(period_s)


@contextlib.contextmanager
def running_cluster(*, cpus: int = 4) -> Iterator[Cluster]:
    """Start a cluster, and stop it behind the block.

    Args:
        cpus: of each node, as Slurm counts them; more than the machine has are believed.
    """
    folder = Path(tempfile.mkdtemp(prefix="dsaux-slurm-"))  # a socket's path may have 107 bytes: not below tmp_path
    cluster = Cluster(folder)
    try:
        _configure(folder, cpus=cpus)
        _start(cluster)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, *, cpus: int) -> None:
    folder.chmod(0o755)
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    ports = {"port": free_port(), "port_1": free_port(), "port_2": free_port()}
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, cpus=cpus, **ports), encoding="utf-8")


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / file}" for option, file in files.items()]
    _spawn(cluster, ["munged", "--foreground", "--force", *options], log="munged")
    wait_until(lambda: (folder / "munge.socket").exists(), limit_s=START_LIMIT_S, what="munged listens")
    _spawn(cluster, ["slurmctld", "-D", "-c"], log="slurmctld.out")
    for node in ("n1", "n2"):
        _spawn(cluster, ["slurmd", "-D", "-N", node], log=f"slurmd.{node}.out")
    try:
        wait_until(lambda: _idle_nodes(cluster) == 2, limit_s=START_LIMIT_S, what="two idle nodes")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.logs()}") from None


def _spawn(cluster: Cluster, command: Sequence[str], *, log: str) -> None:
    with (cluster.folder / f"{log}.log").open("wb") as file:
        cluster.daemons.append(
            subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=cluster.environment(), start_new_session=True
            )
        )


def _idle_nodes(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        capture_output=True,
        text=True,
        env=cluster.environment(),
        timeout=START_LIMIT_S,
    )
    return done.stdout.split().count("idle")
