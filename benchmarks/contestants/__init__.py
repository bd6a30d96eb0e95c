"""The contestants by name: who trains the same work, each on its real engine.

To add one: a module with `build(work, seat, schedule=...) -> Runner` and a line in `CONTESTANTS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from work import Work


@dataclass(frozen=True)
class Seat:
    """Where a rank of a contestant sits. The process group stands when a contestant is built.

    Attributes:
        rank: of this process.
        ranks: processes of this contestant.
        micro_batches: micro-batches in a step; each has global_batch / micro_batches samples (per replica under DDP:
            its share of the global batch, divided by it).
        bounds: layer indices that cut the network into `ranks` x `chunks` consecutive pieces, 0 first.
        device: of this rank.
    """

    rank: int
    ranks: int
    micro_batches: int
    bounds: tuple[int, ...]
    device: torch.device


class Runner(Protocol):
    """One rank of a contestant at one number of micro-batches."""

    fill: int
    """Steps that it takes after a `drain` until every rank has work; they are not measured."""

    def step(self) -> float | None:
        """Train on the next global batch; a collective call of all ranks.

        Returns:
            The loss of the step, mean over the samples whose loss this rank computes; None where it computes none.
        """
        ...

    def drain(self) -> None:
        """Finish what is under way."""
        ...


@dataclass(frozen=True)
class Contestant:
    """Who it is.

    Attributes:
        module: in this package.
        chunks: pieces of the network that a rank holds (0: the whole network).
        is_exact: whether it computes back-propagation's gradient.
        least_micro_batches: of a pipeline of so many ranks.
        schedule: for the module.
    """

    module: str
    chunks: int
    is_exact: bool = True
    least_micro_batches: Callable[[int], int] = lambda ranks: 1
    schedule: str = ""

    def build(self, work: Work, seat: Seat) -> Runner:
        """This rank's runner; a collective call of all ranks."""
        module = importlib.import_module(f"contestants.{self.module}")
        return cast(Runner, module.build(work, seat, schedule=self.schedule))


CONTESTANTS: Mapping[str, Contestant] = {
    "one-process": Contestant("one_process", chunks=0),
    "ddp": Contestant("ddp", chunks=0),
    "deepspeed-1f1b": Contestant("deepspeed_pipe", chunks=1, schedule="1f1b"),
    "deepspeed-dualpipev": Contestant(
        "deepspeed_pipe", chunks=2, schedule="dualpipev", least_micro_batches=lambda ranks: 2 * ranks
    ),
    "torch-1f1b": Contestant("torch_pipe", chunks=1, schedule="1f1b", least_micro_batches=lambda ranks: ranks),
    "torch-interleaved": Contestant(
        "torch_pipe", chunks=2, schedule="interleaved", least_micro_batches=lambda ranks: ranks
    ),
    "torch-zbv": Contestant("torch_pipe", chunks=2, schedule="zbv", least_micro_batches=lambda ranks: 2 * ranks),
    "dsaux-penalty": Contestant("dsaux_pipe", chunks=1, is_exact=False, schedule="penalty"),
    "dsaux-al": Contestant("dsaux_pipe", chunks=1, is_exact=False, schedule="al"),
    "dsaux-local": Contestant("dsaux_pipe", chunks=1, is_exact=False, schedule="local"),
}
"""Names as in the results."""

LOCK_STEP = "lock-step"
GAUGES: Mapping[str, Contestant] = {LOCK_STEP: Contestant("lock_step", chunks=0)}
"""Who is measured for the planner's sake alone (`gauges`)."""
