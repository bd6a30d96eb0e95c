"""A step in the middle of a run asks its device for no number and hands it none, so that the host runs ahead of a GPU.

On a CPU nothing is late: here the calls are looked for that wait on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dsaux.engine import AuxPipelineEngine
from tests.ranks import run_ranks
from tests.small_engine import Case, build

pytestmark = pytest.mark.multiprocess

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "equal",
    "__bool__",
    "__int__",
    "__index__",
    "__float__",
    "__format__",
}
"""Functions of PyTorch for which the host waits until a GPU has done all before them."""
COPIES = {"tensor", "as_tensor"}
"""Functions that copy numbers of the host to a device, and wait likewise."""
STEPS = 8


def case(schedule: str, bounds: tuple[int, ...] = (0, 3, 6), **blocks: Any) -> Case:
    block = {"data": {"guard_every": 0}, **blocks}
    return Case(bounds, schedule, accumulation=2, steps=STEPS, changes={"dsaux": block})


CASES = {
    "penalty": case("penalty"),
    "al": case("al"),
    "al, overlap": case("al", aux={"overlap": True}),
    "al, unscaled": case("al", aux={"scaled": False}),
    "al, a stream for the AuxNet": case("al", run={"aux_stream": True}),
    "local": case("local"),
    "al, 3 stages": case("al", (0, 2, 4, 6)),
}


class Waits(TorchFunctionMode):
    """Collects the calls within its block in which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS | COPIES:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class NoReader:
    """In place of the one number that is read some steps late."""

    def put(self, value: Any) -> None:
        """Nothing is kept."""

    def get(self) -> float:
        """Nobody wants to stop."""
        return 0.0


def waits_of(cases: dict[str, Case]) -> dict[str, list[str]]:
    """What this rank waits for in the last step of each case."""
    return {name: _waits_of_last_step(build(case), case) for name, case in cases.items()}


def _waits_of_last_step(engine: AuxPipelineEngine, case: Case) -> list[str]:
    engine._stop_reader = NoReader()  # type: ignore[assignment]
    data = iter(case.replica_batches(0))
    for _ in range(case.steps - 1):
        engine.train_batch(data)
    with Waits() as waits:
        engine.train_batch(data)
    return waits.seen


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_host_waits_for_nothing_once_all_stages_have_a_batch(world_size: int) -> None:
    cases = {name: case for name, case in CASES.items() if case.world_size == world_size}
    for rank in run_ranks(waits_of, world_size, cases):
        assert rank == {name: [] for name in cases}


def test_what_a_host_would_wait_for_is_seen() -> None:
    total = torch.ones(2)
    with Waits() as waits:
        total.tolist()
        bool(total.sum() > 0)
        float(total[0])
        torch.tensor([1.0])
    assert waits.seen == ["tolist", "__bool__", "__float__", "tensor"]
