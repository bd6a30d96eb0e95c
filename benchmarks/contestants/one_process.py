"""One process trains the whole network: a plain PyTorch loop."""

from __future__ import annotations

from work import Work, loss_of

from contestants import Runner, Seat


class _OneProcess:
    fill = 0

    def __init__(self, work: Work, seat: Seat) -> None:
        self.work, self.micro_batches = work, seat.micro_batches
        self.model = work.build(0, len(work.layers)).to(seat.device).train()
        self.optimizer = work.optimizer(self.model)
        self.steps = 0

    def step(self) -> float:
        inputs, labels = self.work.batch(self.steps)
        self.steps += 1
        total = 0.0
        for x, y in zip(inputs.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True):
            loss = loss_of(self.model(x), y) / self.micro_batches
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def drain(self) -> None:
        pass


def build(work: Work, seat: Seat, *, schedule: str) -> Runner:
    """The runner of the only rank."""
    return _OneProcess(work, seat)
