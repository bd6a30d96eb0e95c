"""Starts train.py as a launcher would, one process a rank, so that a test knows each rank's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ranks import free_port, rank_environment

ROOT = Path(__file__).resolve().parent.parent.parent
TIME_LIMIT_S = 300.0  # the first start on a machine compiles an operation of DeepSpeed's


@dataclass
class Ranks:
    """The processes of one run.

    Attributes:
        processes: by rank.
        logs: what each has written, by rank; standard output and errors together.
        port: of the process group.
    """

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path] = field(default_factory=list)
    port: int = 0

    def wait(self, *, limit_s: float = TIME_LIMIT_S) -> list[int]:
        """Exit codes, when all ranks have ended.

        Raises:
            AssertionError: if one still runs at the limit; all are killed then.
        """
        deadline = time.monotonic() + limit_s
        try:
            return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"ranks did not end within {limit_s:.0f} s:\n{self.text()}") from None
        finally:
            self.kill()

    def is_running(self) -> bool:
        """Whether all ranks still run."""
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def text(self) -> str:
        """All logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self.logs)


def start_ranks(
    arguments: Sequence[str],
    *,
    world_size: int,
    folder: Path,
    file_bytes: int | None = None,
    device: str = "cpu",
    **variables: str,
) -> Ranks:
    """Start `train.py arguments` on each rank.

    Args:
        arguments: of train.py.
        world_size: processes.
        folder: where the logs go; must not exist.
        file_bytes: largest file that a rank may write, as on a disk that is nearly full; None for no limit.
        device: "cpu", or "cuda" for ranks that share the first GPU.
        variables: further environment variables.
    """
    folder.mkdir(parents=True)
    port = free_port()
    ranks = Ranks([], port=port)
    for rank in range(world_size):
        environment = {
            **os.environ,
            **rank_environment(rank, world_size, port=port, device=device),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        log = folder / f"rank_{rank}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-u", str(ROOT / "train.py"), *arguments]
            if file_bytes is not None:
                command = ["prlimit", f"--fsize={file_bytes}", *command]
            ranks.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
        ranks.logs.append(log)
    return ranks


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, of one kind or all; none before there is a file."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if kind is None or event["event"] == kind]
