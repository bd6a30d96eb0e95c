"""Schedules by name: what a rank does in a batch, as a stream of instructions that DeepSpeed's engine runs.

To add one: its instructions in `instructions.py`, their effects in `check.py`, the schedule in a file of its
own with a drawing, a line here. `python -m dsaux.schedules` draws and checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from deepspeed.runtime.pipe.schedule import PipeSchedule, TrainSchedule

from dsaux.schedules.penalty import PenaltySchedule

SCHEDULES: Mapping[str, type[PipeSchedule]] = MappingProxyType({"penalty": PenaltySchedule, "1f1b": TrainSchedule})
"""The values that `dsaux.pipeline.schedule` may take; each is made as (micro_batches, stages, stage_id)."""
