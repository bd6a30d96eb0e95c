"""What a figure depends on beside the configuration: hardware, versions, commit, command line.

`dsaux.report` writes it into every run folder; the benchmarks put it beside their results. It names no
path of this machine but those on the command line.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import dsaux

_GIT_TIMEOUT_S = 10.0


def describe_environment(*, world_size: int) -> dict[str, Any]:
    """Describe this host and process as a JSON document; what cannot be found is None.

    Args:
        world_size: number of processes.
    """
    commit, modified = _git_state()
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git_commit": commit,
        "git_modified": modified,
        "world_size": world_size,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpu_names(),
        "versions": {
            "dsaux": getattr(dsaux, "__version__", None),
            **{name: _version(name) for name in ("torch", "torchvision", "deepspeed")},
            "dali": _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120"),
            "numpy": _version("numpy"),
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu_names() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the working copy that this package is part of, and whether tracked files differ from it."""
    # Not just any repository around the package: an installed copy may lie inside somebody else's.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    commit = _git("rev-parse", "--verify", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
