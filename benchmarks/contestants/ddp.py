"""PyTorch's DistributedDataParallel: every rank holds the whole network and trains a share of the batch."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel
from work import Work, loss_of

from contestants import Runner, Seat


class _DDP:
    fill = 0

    def __init__(self, work: Work, seat: Seat) -> None:
        self.work, self.seat = work, seat
        model = work.build(0, len(work.layers)).to(seat.device).train()
        with warnings.catch_warnings():  # newer versions have another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            # The faster choice: running statistics stay each rank's own.
            self.model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.optimizer = work.optimizer(self.model)
        self.steps = 0

    def step(self) -> float:
        inputs, labels = self.work.share(self.steps, rank=self.seat.rank, ranks=self.seat.ranks)
        self.steps += 1
        count = self.seat.micro_batches
        total = torch.zeros(())
        for index, (x, y) in enumerate(zip(inputs.chunk(count), labels.chunk(count), strict=True)):
            with contextlib.nullcontext() if index == count - 1 else self.model.no_sync():
                loss = loss_of(self.model(x), y) / count
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def drain(self) -> None:
        pass


def build(work: Work, seat: Seat, *, schedule: str) -> Runner:
    """This rank's runner."""
    return _DDP(work, seat)
