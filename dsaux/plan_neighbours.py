"""Keeps the other cores of this machine busy while the planner times something: python -m dsaux.plan_neighbours

The ranks of a run on a CPU share caches, memory and clock: a pass takes longer while the neighbours compute than alone,
and all the more the larger the tensors are that they compute with. `Neighbours` starts processes that pass a residual
block forward and backward whenever they are told to, on activations as large as those of the network that is timed.
They end with their parent, however it ends: their standard input closes.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import weakref
from collections.abc import Iterator

GO, HALT, READY = "go", "halt", "ready"
_CHANNELS, _SIDE = 32, 16
_SAMPLE_NUMBERS = _CHANNELS * _SIDE * _SIDE


class Neighbours:
    """Processes that compute while :meth:`busy` is entered, and wait otherwise.

    Args:
        count: how many; 0 for none.
        threads: of each.
    """

    def __init__(self, count: int, *, threads: int) -> None:
        self._count, self._threads = count, threads
        self._processes: list[subprocess.Popen[str]] = []

    @contextlib.contextmanager
    def busy(self, *, numbers: int) -> Iterator[None]:
        """Let them compute within the block; the first time it starts them, which takes seconds.

        Args:
            numbers: in an activation that they compute with, rounded to whole samples of their own block.
        """
        if not self._processes:
            self._start()
        self._tell(f"{GO} {max(1, round(numbers / _SAMPLE_NUMBERS))}")
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        try:
            yield
        finally:
            self._tell(HALT)

    def _start(self) -> None:
        command = [sys.executable, "-m", "dsaux.plan_neighbours"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        for _ in range(self._count):
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            weakref.finalize(self, _end, process)
            self._processes.append(process)

    def _tell(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{word}\n")
                process.stdin.flush()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def main() -> None:
    """Compute from "go SAMPLES" to "halt" on standard input, until it closes."""
    import torch
    from torch import nn

    from dsaux.runtime import keep_freed_memory

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    block = nn.Sequential(
        nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(_CHANNELS),
        nn.ReLU(),
        nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(_CHANNELS),
    )
    keep_freed_memory()

    def compute() -> None:
        torch.relu(batch + block(batch)).square().mean().backward()  # type: ignore[no-untyped-call]

    while (words := sys.stdin.readline().split()) and words[0] == GO:
        batch = torch.randn(int(words[1]), _CHANNELS, _SIDE, _SIDE)
        compute()  # makes what is made once
        print(READY, flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            compute()
        if sys.stdin.readline().strip() != HALT:
            return


if __name__ == "__main__":
    main()
