"""What the watch looks at: this process, its machine, the process group's store. Used by `dsaux.watch`."""

from __future__ import annotations

import json
import linecache
import os
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dsaux.watch_rules import Cause, Sign

if TYPE_CHECKING:  # takes seconds to import: what is wrong with the input is said before
    from torch.distributed import Store  # type: ignore[attr-defined]

STORE_TIMEOUT_S = 5.0

_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_LIBRARIES = ("/site-packages/", "/dist-packages/", "/lib/python", "<frozen")


# ---- this process and its machine -----------------------------------------------------------------------------------


def machine() -> str:
    """Kernel and process namespace of this process; empty where they can't be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}" if process_exists(os.getpid()) else ""
    except OSError:
        return ""


def process_exists(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent to collect it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def main_thread_frames() -> list[FrameType]:
    """Frames of the main thread, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def locate(frames: Sequence[FrameType]) -> tuple[int, str, bool]:
    """Where a thread stands.

    Args:
        frames: its frames, the innermost first.

    Returns:
        A number that changes when it moves, its line in code that is no library's, whether it waits for other ranks.
    """
    if not frames:
        return 0, "", False
    files = [frame.f_code.co_filename for frame in frames]
    is_own = ["/dsaux/" in file or not any(part in file for part in _LIBRARIES) for file in files]
    frame = next((frame for frame, own in zip(frames, is_own, strict=True) if own), frames[0])
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
    waits = any(part in file for file in files for part in _COLLECTIVES)
    # Handles of transfers are awaited by a call straight into C++.
    waits = waits or (is_own[0] and ".wait(" in linecache.getline(files[0], frames[0].f_lineno))
    return hash(tuple((id(frame.f_code), frame.f_lasti) for frame in frames)), place, waits


class Board:
    """Signs and the cause in the process group's store, through a connection of its own.

    Raises:
        OSError, RuntimeError: here and in all methods, while the store can't be reached.
    """

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
        # While nobody listens, PyTorch's own client tries for long and prints C++ traces.
        socket.create_connection((host, port), timeout=STORE_TIMEOUT_S).close()
        store = TCPStore(host, port, None, False, timeout=timedelta(seconds=STORE_TIMEOUT_S), wait_for_workers=False)
        # torchrun may keep the store, and an old cause in it, when it starts the ranks anew.
        self.store: Store = PrefixStore(f"dsaux/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def exchange(self, sign: Sign, *, known: Iterable[int], world_size: int) -> tuple[list[Sign], Cause | None]:
        """Publish a sign; returns those of all ranks that have published one, and the cause of the end, if any."""
        self.store.set(f"sign/{sign.rank}", json.dumps(asdict(sign)))
        keys = [f"sign/{rank}" for rank in range(world_size)]
        keys = [key for rank, key in enumerate(keys) if rank in known or self.store.check([key])]
        signs = [Sign(**json.loads(value)) for value in self.store.multi_get(keys)]
        return signs, _read_cause(self.store.get("cause")) if self.store.check(["cause"]) else None

    def publish(self, cause: Cause) -> Cause:
        """Publish a cause, unless there is one; returns the one that holds."""
        return _read_cause(self.store.compare_set("cause", "", json.dumps(asdict(cause))))

    def count(self, key: str, new: int) -> int:
        """Add to a number in the store, e.g. of the ranks that know the cause, and return it."""
        return self.store.add(key, new)


def _read_cause(value: bytes) -> Cause:
    found = json.loads(value)
    return Cause(found["text"], tuple(found["ranks"]), found["exit_code"])
