"""Every wrong input ends on every rank within seconds: one clear error, a failing code, no process group.

The ranks are started as a launcher does: two processes of the real train.py that find their place in the
environment. They mostly wait, so several cases run at a time; each test then looks at its own.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bad_input import CASES, BadInput
from tests.ranks import free_port

pytestmark = pytest.mark.launch

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 2
TIME_LIMIT_S = 60.0
LAUNCHER_GRACE_S = 10.0
"""How long after one failed rank a launcher of ours ends the others; train.py's other ranks speak after 3 s."""
CASES_AT_A_TIME = 8
OUR_VARIABLES = re.compile(r"RANK|WORLD_SIZE|LOCAL_.*|MASTER_.*|SLURM_.*|OMPI_.*|PMI_.*|TORCHELASTIC_.*")


@dataclass(frozen=True)
class Ended:
    """How one rank ended.

    Attributes:
        code: exit code.
        output: all it printed.
        was_ended: our launcher ended it, because another rank had failed.
    """

    code: int
    output: str
    was_ended: bool

    @property
    def errors(self) -> list[str]:
        """The lines that are errors."""
        return [line for line in self.output.splitlines() if "error:" in line]


@dataclass(frozen=True)
class Outcome:
    """How a case ended: its ranks, and whether one of them came to the meeting point of the process group."""

    ranks: list[Ended]
    met: bool


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    """The cases of all collected tests, started a few at a time."""
    collected = {
        item.callspec.id
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_wrong_input.__name__
    }
    cases = [case for case in CASES if case.name in collected]
    with ThreadPoolExecutor(CASES_AT_A_TIME) as pool:
        yield {case.name: pool.submit(_run, case, tmp_path_factory.mktemp("case")) for case in cases}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input(case: BadInput, outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes[case.name].result()
    first, *others = outcome.ranks
    assert first.code > 0, first.output
    assert len(first.errors) == 1, first.output
    assert case.says in first.errors[0]
    for rank in outcome.ranks:
        assert rank.code != 0
        assert "Traceback" not in rank.output
        assert len(rank.errors) <= 1, rank.output
    if not case.on_rank_0_alone:
        assert not any(rank.was_ended for rank in others), "a rank did not end by itself"
        assert not outcome.met, "a rank went on to the process group"


def _run(case: BadInput, folder: Path) -> Outcome:
    _write_inputs(case, folder)
    with _listen() as meeting_point:
        # a process group would meet at this port: rank 0 cannot open it while it is ours, others connect to it
        port = meeting_point.getsockname()[1]
        processes = [_start(case, folder, rank=rank, port=port) for rank in range(WORLD_SIZE)]
        ended = _wait(processes, deadline_s=LAUNCHER_GRACE_S if case.on_rank_0_alone else TIME_LIMIT_S)
        outputs = [(folder / f"output{rank}").read_text(errors="replace") for rank in range(WORLD_SIZE)]
        meeting_point.settimeout(0)
        try:
            meeting_point.accept()[0].close()
            met = True
        except BlockingIOError:
            met = False
    ranks = [
        Ended(process.returncode, output, was_ended=process in ended)
        for process, output in zip(processes, outputs, strict=True)
    ]
    return Outcome(ranks, met)


def _listen() -> socket.socket:
    """A socket that listens at a free port.

    A process that another thread starts holds the probe of a free port until its program begins: then the port, free a
    moment before, is in use.
    """
    for _ in range(100):
        try:
            return socket.create_server(("127.0.0.1", free_port()))
        except OSError:
            time.sleep(0.01)
    raise AssertionError("no port is free")


def _write_inputs(case: BadInput, folder: Path) -> None:
    (folder / "config.json").write_text(case.file_text())
    if case.prepare is not None:
        case.prepare(folder)


def _command(case: BadInput, folder: Path) -> list[str]:
    config = [] if case.config is None else ["--ds_config", case.config]
    return [word.replace("{folder}", str(folder)) for word in (str(ROOT / "train.py"), *config, *case.arguments)]


def _environment(case: BadInput, folder: Path, **place: str) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": "", **place}
    environment = {name: value for name, value in os.environ.items() if not OUR_VARIABLES.fullmatch(name)}
    environment |= ours
    for name, value in case.environment.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value.replace("{folder}", str(folder))
    environment["PYTHONPATH"] = f"{environment['PYTHONPATH']}{os.pathsep}{ROOT}"
    return environment


def _start(case: BadInput, folder: Path, *, rank: int, port: int) -> subprocess.Popen[bytes]:
    environment = _environment(
        case,
        folder,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with (folder / f"output{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *_command(case, folder)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(processes: list[subprocess.Popen[bytes]], *, deadline_s: float) -> list[subprocess.Popen[bytes]]:
    """Waits for all processes; ends those that still run `deadline_s` after the first failed, and returns"
    " them."""
    limit = time.monotonic() + TIME_LIMIT_S
    try:
        processes[0].wait(TIME_LIMIT_S)
        limit = min(limit, time.monotonic() + deadline_s)
        for process in processes[1:]:
            process.wait(max(0.0, limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    late = [process for process in processes if process.poll() is None]
    for process in late:
        process.kill()
        process.wait()
    return late


LAUNCHED = (
    "misspelt key of dsaux.aux",
    "stages that do not divide the processes",
    "no such file",
    "run folder that holds a run",
)


@pytest.mark.parametrize("name", LAUNCHED)
def test_wrong_input_through_the_deepspeed_launcher(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    _write_inputs(case, tmp_path)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    launcher = shutil.which("deepspeed", path=places)
    assert launcher is not None, "DeepSpeed's launcher is not installed"
    result = subprocess.run(
        [launcher, "--num_gpus", str(WORLD_SIZE), "--master_port", str(free_port()), *_command(case, tmp_path)],
        cwd=tmp_path,
        env=_environment(case, tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "Traceback" not in output
    assert [line for line in output.splitlines() if "[rank 0 on" in line and case.says in line], output
