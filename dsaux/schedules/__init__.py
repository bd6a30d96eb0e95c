"""Schedules by name: what a rank does in a batch, as a stream of instructions that DeepSpeed's engine runs.

To add one: its instructions in `instructions.py`, their effects in `effects.py`, the schedule in a file of its
own with a drawing, a line here. `python -m dsaux.schedules` draws and checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from deepspeed.runtime.pipe.schedule import PipeSchedule, TrainSchedule

from dsaux.schedules.lagrangian import LagrangianSchedule
from dsaux.schedules.local import LocalSchedule
from dsaux.schedules.penalty import PenaltySchedule


class _Run(Protocol):
    """Makes all schedules of one stage for a number of batches, in the order in which the engine runs them."""

    def __call__(self, micro_batches: int, stages: int, stage_id: int, *, num_batches: int) -> list[PipeSchedule]: ...


def _penalty(micro_batches: int, stages: int, stage_id: int, *, num_batches: int) -> list[PipeSchedule]:
    return [PenaltySchedule(micro_batches, stages, stage_id) for _ in range(num_batches)]


def _exact(micro_batches: int, stages: int, stage_id: int, *, num_batches: int) -> list[PipeSchedule]:
    return [TrainSchedule(micro_batches, stages, stage_id) for _ in range(num_batches)]


def _lagrangian(
    micro_batches: int, stages: int, stage_id: int, *, num_batches: int, overlap: bool = False
) -> list[PipeSchedule]:
    ticks = range(num_batches + stages - 1)
    return [
        LagrangianSchedule(
            micro_batches,
            stages,
            stage_id,
            tick=tick,
            num_batches=None if tick < num_batches else num_batches,
            overlap=overlap,
        )
        for tick in ticks
    ]


def _overlapped(micro_batches: int, stages: int, stage_id: int, *, num_batches: int) -> list[PipeSchedule]:
    return _lagrangian(micro_batches, stages, stage_id, num_batches=num_batches, overlap=True)


def _local(micro_batches: int, stages: int, stage_id: int, *, num_batches: int) -> list[PipeSchedule]:
    return [
        LocalSchedule(
            micro_batches, stages, stage_id, tick=tick, num_batches=None if tick < num_batches else num_batches
        )
        for tick in range(num_batches + stages - 1)
    ]


RUNS: Mapping[str, _Run] = MappingProxyType(
    {"penalty": _penalty, "al": _lagrangian, "al-overlap": _overlapped, "local": _local, "1f1b": _exact}
)
"""What a stage runs for a number of batches, fill and drain included: the values of `dsaux.pipeline.schedule`, and
`al-overlap` for `al` with `dsaux.aux.overlap`."""
