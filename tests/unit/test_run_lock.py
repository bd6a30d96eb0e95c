"""A run folder has one run at a time, and is free as soon as its process is gone, however it went."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsaux.config import ConfigError
from dsaux.run_lock import hold_run, lock_run

HOLD = """
import os, sys
from pathlib import Path
from dsaux.run_lock import hold_run
lock = hold_run(Path(sys.argv[1]))
worker = os.fork() if sys.argv[2] == "fork" else None
if worker == 0:
    lock.release()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def a_run_in(folder: Path, *, port: str = "1", forks: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder; with `forks` a worker of it as well, which has closed the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "fork" if forks else ""],
        env={**os.environ, "MASTER_PORT": port},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(1 + forks):
        process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()  # closes the pipe that the worker waits for


@pytest.fixture(autouse=True)
def _at_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "2")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_second_run_is_refused_on_every_rank_with_who_holds_the_folder(is_first: bool, tmp_path: Path) -> None:
    with a_run_in(tmp_path) as run, pytest.raises(ConfigError) as caught:
        lock_run(tmp_path, is_first=is_first)
    text = str(caught.value)
    assert f"{tmp_path} is in use: process {run.pid} on {socket.gethostname()}" in text
    assert "give another --run_dir" in text
    assert "\n" not in text


@pytest.mark.parametrize(("variable", "value"), [("TORCHELASTIC_RUN_ID", "another"), ("MASTER_ADDR", "127.0.0.1")])
def test_a_run_at_the_same_port_is_known_by_its_torchrun_and_by_its_host(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_run_in(tmp_path, port="2"):
        monkeypatch.setenv(variable, value)
        monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
        with pytest.raises(ConfigError, match="is in use"):
            lock_run(tmp_path, is_first=False)


def test_the_other_ranks_of_the_run_itself_go_on(tmp_path: Path) -> None:
    with a_run_in(tmp_path, port="2"):
        assert lock_run(tmp_path, is_first=False) is None


def test_the_other_ranks_do_not_disturb_rank_0(tmp_path: Path) -> None:
    assert lock_run(tmp_path, is_first=False) is None  # before there is a file
    with a_run_in(tmp_path):
        pass
    assert lock_run(tmp_path, is_first=False) is None  # of a run that has ended
    with a_run_in(tmp_path, port="2"):
        lock_run(tmp_path, is_first=False)
        with pytest.raises(ConfigError, match="is in use"):
            hold_run(tmp_path)


@pytest.mark.parametrize("forks", [False, True])
def test_a_killed_run_can_be_resumed_at_once_even_while_a_worker_of_it_lives(forks: bool, tmp_path: Path) -> None:
    with a_run_in(tmp_path, forks=forks) as run:
        with pytest.raises(ConfigError, match="is in use"):
            hold_run(tmp_path)
        run.send_signal(signal.SIGKILL)
        run.wait()
        hold_run(tmp_path).release()


def test_a_run_that_has_ended_leaves_the_folder_free(tmp_path: Path) -> None:
    lock = hold_run(tmp_path)
    lock.release()
    with a_run_in(tmp_path), pytest.raises(ConfigError, match="is in use"):
        hold_run(tmp_path)


def test_a_run_without_a_folder_yet_locks_nothing() -> None:
    assert lock_run(None, is_first=True) is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_hindrance_but_said(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "run.lock").touch()
    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = hold_run(tmp_path)
    assert lock.warning is not None
    assert f"{tmp_path} has no locks" in lock.warning
    assert lock_run(tmp_path, is_first=False) is None


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent cannot be written: No such file or directory\. Give --run_dir"):
        hold_run(tmp_path / "absent")
