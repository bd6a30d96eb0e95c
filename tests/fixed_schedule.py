"""A schedule given as a list, for tests that plant a fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe.schedule import PipeSchedule

Steps = list[list[Any]]


class Fixed(PipeSchedule):
    """A stage's steps as a list."""

    def __init__(self, steps: Steps, num_buffers: int, micro_batches: int, stages: int, stage: int) -> None:
        super().__init__(micro_batches, stages, stage)
        self.fixed, self.num_buffers = steps, num_buffers

    def steps(self) -> Iterator[list[Any]]:
        yield from self.fixed

    def num_pipe_buffers(self) -> int:
        return self.num_buffers
