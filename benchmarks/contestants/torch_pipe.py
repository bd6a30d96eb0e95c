"""PyTorch's own pipelines, torch.distributed.pipelining: 1F1B, interleaved 1F1B and zero bubble (ZBV)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from work import Work, loss_of

from contestants import Runner, Seat
from dsaux.models import boundary_specs

PIECES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "1f1b": lambda rank, ranks: (rank,),
    "interleaved": lambda rank, ranks: (rank, ranks + rank),
    "zbv": lambda rank, ranks: (rank, 2 * ranks - 1 - rank),
}
"""Pieces of the network that a rank holds, by schedule."""


class _Pipe:
    fill = 0

    def __init__(self, work: Work, seat: Seat, schedule: str) -> None:
        self.work, self.steps = work, 0
        pieces = PIECES[schedule](seat.rank, seat.ranks)
        self.stages = [_stage(work, seat, piece) for piece in pieces]
        modules = nn.ModuleList(stage.submod for stage in self.stages)
        self.optimizer = work.optimizer(modules)
        # Gradients are those of the mean over the global batch: sums over the micro-batches, divided by their number.
        options = {"n_microbatches": seat.micro_batches, "loss_fn": loss_of, "scale_grads": True}
        self.schedule: Schedule1F1B | ScheduleInterleaved1F1B | ScheduleZBVZeroBubble
        if schedule == "1f1b":
            self.schedule = Schedule1F1B(self.stages[0], **options)
        elif schedule == "interleaved":
            self.schedule = ScheduleInterleaved1F1B(self.stages, **options)
        else:
            self.schedule = ScheduleZBVZeroBubble(self.stages, **options)
        self._is_first = any(stage.is_first for stage in self.stages)
        self._is_last = any(stage.is_last for stage in self.stages)

    def step(self) -> float | None:
        inputs, labels = self.work.batch(self.steps)
        self.steps += 1
        losses: list[Tensor] = []
        self.schedule.step(
            *([inputs] if self._is_first else []),
            target=labels if self._is_last else None,
            losses=losses,
            return_outputs=False,
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(torch.stack(losses).detach().mean()) if self._is_last else None

    def drain(self) -> None:
        pass


def build(work: Work, seat: Seat, *, schedule: str) -> Runner:
    """This rank's runner for a name in `PIECES`."""
    return _Pipe(work, seat, schedule)


def _stage(work: Work, seat: Seat, piece: int) -> PipelineStage:
    """One piece. Shapes are given: else PyTorch would find them by passes before the first step."""
    first, last = seat.bounds[piece : piece + 2]
    specs = [work.input_spec, *boundary_specs(list(work.layers), input_spec=work.input_spec)]
    samples = work.global_batch // seat.micro_batches
    enters, leaves = (specs[bound].empty(samples, device=seat.device) for bound in (first, last))
    return PipelineStage(
        work.build(first, last).to(seat.device).train(),
        piece,
        len(seat.bounds) - 1,
        seat.device,
        input_args=enters.requires_grad_(piece > 0),
        output_args=leaves.requires_grad_(),
    )
