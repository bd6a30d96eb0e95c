"""One run at a time in a run folder: rank 0 holds a lock in it, from before it changes anything to its end.

    run.lock    byte 0    locked by rank 0 of the run; another run's rank 0 is refused
                byte 1    locked as soon as the text tells who that is; the other ranks look at it
                text      {"host": "node1", "pid": 4711, "port": "29500", "torchrun": ""}

train.py calls `lock_run` on every rank, before any process group. The locks are POSIX record locks: they end with the
process, however it ends, and forked workers do not have them. They end as well when the process closes the file
through any descriptor, so nothing else in a run may open it; and it is never removed, as two runs could then hold two
files of one name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from dsaux.config_rules import ConfigError

LOCK_FILE = "run.lock"
_HOLDER, _TEXT = 0, 1
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_LONGEST_TEXT = 4096  # bytes
_ATTEMPTS, _PAUSE_S = 20, 0.05  # the text comes a moment after the lock


@dataclass(frozen=True, eq=False)
class RunLock:
    """The lock of a run, for as long as its file is open.

    Attributes:
        warning: what the user has to know where the file system has no locks; None where it has.
    """

    warning: str | None
    _file: FileIO = field(repr=False)

    def release(self) -> None:
        """Let another run have the folder."""
        self._file.close()


def lock_run(run_dir: Path | None, *, is_first: bool) -> RunLock | None:
    """Make sure that no other run is at work in the folder that a run goes on in; on every rank.

    Args:
        run_dir: the folder; None for a run that will make a new one.
        is_first: whether this is rank 0, which holds the lock; the others look whether a run holds it that is not
            theirs, so that they end as well.

    Returns:
        The lock on rank 0, to be kept to the end of the run.

    Raises:
        ConfigError: if another run holds it, with its host and process.
    """
    if run_dir is None:
        return None
    if is_first:
        return hold_run(run_dir)
    with contextlib.suppress(OSError), (run_dir / LOCK_FILE).open("rb", buffering=0) as file:
        holder = _holder(file)
        if holder is not None and not _is_ours(holder):
            raise _in_use(run_dir, holder)
    return None


def hold_run(run_dir: Path) -> RunLock:
    """Lock an existing run folder, on rank 0.

    Raises:
        ConfigError: if another run holds it, with its host and process, or the folder cannot be written.
    """
    try:
        file = FileIO(os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise _not_writable(run_dir, error) from error
    try:
        _lock(file, _HOLDER)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return RunLock(_no_locks(run_dir), file)
        if error.errno in _TAKEN:
            raise _in_use(run_dir, _awaited_holder(file)) from error
        raise _not_writable(run_dir, error) from error
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **_meeting()})
    with contextlib.suppress(OSError):  # on a full disk there is a lock without a name
        file.truncate(0)
        file.write(text.encode())
        os.fsync(file.fileno())
        _lock(file, _TEXT, wait=True)
    return RunLock(None, file)


def _lock(file: FileIO, byte: int, *, kind: int = fcntl.LOCK_EX, wait: bool = False) -> None:
    fcntl.lockf(file, kind if wait else kind | fcntl.LOCK_NB, 1, byte)


def _holder(file: FileIO) -> dict[str, Any] | None:
    """What the file says of the run that holds it; None if none does, or it does not say so (yet)."""
    try:
        _lock(file, _TEXT, kind=fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _TAKEN:
            return None
    else:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, _TEXT)
        return None
    try:
        holder = json.loads(os.pread(file.fileno(), _LONGEST_TEXT, 0))
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def _awaited_holder(file: FileIO) -> dict[str, Any] | None:
    for _ in range(_ATTEMPTS):
        holder = _holder(file)
        if holder is not None:
            return holder
        time.sleep(_PAUSE_S)
    return None


def _meeting() -> dict[str, str]:
    """Where the ranks of this run meet: the same on all of them. A run beside it may have another port, or the same."""
    return {"port": os.environ.get("MASTER_PORT", ""), "torchrun": os.environ.get("TORCHELASTIC_RUN_ID", "")}


def _is_ours(holder: dict[str, Any]) -> bool:
    """Whether the lock can be that of this rank's own rank 0."""
    address = os.environ.get("MASTER_ADDR", "")
    must_be_here = address == "localhost" or address.startswith("127.") or address == "::1"
    is_near = not must_be_here or holder.get("host") == socket.gethostname()
    return is_near and all(holder.get(key) == value for key, value in _meeting().items())


def _in_use(run_dir: Path, holder: dict[str, Any] | None) -> ConfigError:
    who = "another process" if holder is None else f"process {holder.get('pid')} on {holder.get('host')}"
    return ConfigError(
        f"the run folder {run_dir} is in use: {who} trains in it. Wait for its end or stop it, or give another "
        "--run_dir."
    )


def _no_locks(run_dir: Path) -> str:
    return f"the file system of {run_dir} has no locks: take care that no other run goes on in this folder."


def _not_writable(run_dir: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"the run folder {run_dir} cannot be written: {reason}. Give --run_dir a folder that can be.")
