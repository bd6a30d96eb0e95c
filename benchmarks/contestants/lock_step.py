"""No contestant, but a gauge for the planner: all ranks pass the whole network at once, nothing is sent or trained."""

from __future__ import annotations

import torch
from work import Work, loss_of

from contestants import Runner, Seat


class _LockStep:
    fill = 0

    def __init__(self, work: Work, seat: Seat) -> None:
        self.work, self.seat, self.steps = work, seat, 0
        self.model = work.build(0, len(work.layers)).to(seat.device).train()

    def step(self) -> None:
        inputs, labels = self.work.share(self.steps, rank=self.seat.rank, ranks=self.seat.ranks)
        self.steps += 1
        count = self.seat.micro_batches
        for x, y in zip(inputs.chunk(count), labels.chunk(count), strict=True):
            loss_of(self.model(x), y).backward()
        self.model.zero_grad()
        torch.distributed.barrier()

    def drain(self) -> None:
        pass


def build(work: Work, seat: Seat, *, schedule: str) -> Runner:
    """This rank's runner; `seat.micro_batches` passes between two barriers."""
    return _LockStep(work, seat)
