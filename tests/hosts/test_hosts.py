"""train.py over two hosts: by torchrun, by DeepSpeed's launcher without ssh, and where hosts do not find each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.network import INTERFACE, NAMES, NOBODY, Host, two_hosts, why_not
from tests.launch.small import write_config
from tests.launch.start import ROOT, TIME_LIMIT_S, events

pytestmark = pytest.mark.hosts

PORT = 29_500  # the hosts' own: nothing else runs there
TIMEOUT_S = 10
TRAIN = str(ROOT / "train.py")


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Made once for all tests of this file."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


def start(host: Host, command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start a command on a host; its output goes to a file."""
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": INTERFACE}
    with log.open("wb") as file:
        return subprocess.Popen(
            host.command(command),
            cwd=ROOT,
            env={**os.environ, **own, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(processes: Sequence[subprocess.Popen[bytes]], *, limit_s: float = TIME_LIMIT_S) -> list[int | None]:
    """Exit codes; None for one that was still running at the limit, and was killed."""
    deadline = time.monotonic() + limit_s
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(timeout=max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # a session of its own: launcher and ranks
            process.wait()
            codes.append(None)
    return codes


def launcher(kind: str, hosts: tuple[Host, Host], node: int, folder: Path) -> list[str]:
    """The command of one host."""
    if kind == "torchrun":
        meet = ["--rdzv_backend=c10d", "--rdzv_id=dsaux", f"--rdzv_endpoint={hosts[0].address}:{PORT}"]
        return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meet, TRAIN]
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts), encoding="utf-8")
    options = ["--no_ssh", f"--node_rank={node}", f"--master_addr={hosts[0].address}", f"--master_port={PORT + 1}"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", *options, TRAIN]


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_two_hosts_train_as_one_run(hosts: tuple[Host, Host], kind: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json", pipeline={"partition": "uniform"}, run={"epochs": 1})
    arguments = ["--ds_config", str(config), "--run_dir", str(tmp_path / "run")]
    logs = [tmp_path / f"{host.name}.log" for host in hosts]
    processes = [
        start(host, [*launcher(kind, hosts, node, tmp_path), *arguments], logs[node]) for node, host in enumerate(hosts)
    ]
    codes = finish(processes)
    said = "\n".join(log.read_text(errors="replace") for log in logs)
    assert codes == [0, 0], said
    rows = events(tmp_path / "run", "stages")[0]["rows"]
    assert [(row["rank"], row["stage"]) for row in rows] == [(0, 0), (1, 1)]
    assert {row["host"] for row in rows} == set(NAMES)
    assert events(tmp_path / "run", "final")
    assert all(name in said for name in NAMES), "the table names the host of every rank"


@pytest.fixture(scope="module")
def failed(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, str]]]:
    """Exit code and output of the processes by case; all at once, for each waits until its time is over."""
    folder = tmp_path_factory.mktemp("failed")
    config = write_config(folder / "small.json", pipeline={"partition": "uniform"}, run={"timeout_s": TIMEOUT_S})
    first, second = hosts
    # What the first host answers from that port is lost on the way, as behind a firewall.
    first.call("ip", "rule", "add", "ipproto", "tcp", "sport", str(PORT + 12), "blackhole")
    cases = {
        "wrong host": [(second, 1, 2, NOBODY, PORT + 10)],
        "wrong count": [(first, 0, 4, first.address, PORT + 11), (second, 1, 4, first.address, PORT + 11)],
        "blocked port": [(second, 1, 2, first.address, PORT + 12), (first, 0, 2, first.address, PORT + 12)],
    }
    started: dict[str, list[tuple[subprocess.Popen[bytes], Path]]] = {}
    for case, ranks in cases.items():
        for host, rank, world_size, address, port in ranks:
            variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            variables |= {"MASTER_ADDR": address, "MASTER_PORT": port}
            log = folder / f"{case}_{rank}.log"
            command = [sys.executable, TRAIN, "--ds_config", str(config), "--run_dir", str(folder / f"run_{case}")]
            process = start(host, command, log, **{name: str(value) for name, value in variables.items()})
            started.setdefault(case, []).append((process, log))
    finish([process for processes in started.values() for process, _ in processes])
    return {
        case: [(process.returncode, log.read_text(errors="replace")) for process, log in processes]
        for case, processes in started.items()
    }


def test_a_host_that_is_not_there_is_named_within_the_timeout(failed: dict[str, list[tuple[Any, str]]]) -> None:
    ((code, said),) = failed["wrong host"]
    assert code == 2, said
    assert f"did not come together at MASTER_ADDR:MASTER_PORT {NOBODY}:{PORT + 10} within" in said


def test_a_port_that_is_blocked_is_named_within_the_timeout(failed: dict[str, list[tuple[Any, str]]]) -> None:
    code, said = failed["blocked port"][0]
    assert code == 2, said
    assert f":{PORT + 12} within dsaux.run.timeout_s {TIMEOUT_S}" in said
    code, said = failed["blocked port"][1]
    assert code in (1, 2), said
    assert "rank 1 did not come" in said or "did not come together" in said


def test_another_count_than_was_started_ends_every_rank_within_the_timeout(
    failed: dict[str, list[tuple[Any, str]]],
) -> None:
    for code, said in failed["wrong count"]:
        assert code in (1, 2), said
        assert "did not come" in said
