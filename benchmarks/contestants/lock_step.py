"""No contestant, but a gauge for the planner: all ranks pass the whole network at once, nothing is sent or trained."""

from __future__ import annotations

import torch
from work import Work, loss_of

from contestants import Runner, Seat


class _LockStep:
    fill = 0

    def __init__(self, work: Work, seat: Seat) -> None:
        self.work, self.steps = work, 0
        self._share = range(seat.rank, seat.micro_batches, seat.ranks) or [seat.rank % seat.micro_batches]
        self._count = seat.micro_batches
        self.model = work.build(0, len(work.layers)).to(seat.device).train()

    def step(self) -> None:
        inputs, labels = (part.chunk(self._count) for part in self.work.batch(self.steps))
        self.steps += 1
        for index in self._share:
            loss_of(self.model(inputs[index]), labels[index]).backward()
        self.model.zero_grad()
        torch.distributed.barrier()

    def drain(self) -> None:
        pass


def build(work: Work, seat: Seat, *, schedule: str) -> Runner:
    """This rank's runner; the ranks divide `seat.micro_batches`, and where they outnumber them each takes one."""
    return _LockStep(work, seat)
