"""DeepSpeed's checkpoints carry the AuxNet, its optimizer, its schedule and the running variances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.small_engine import Case, build, weights

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("schedule", ["penalty", "al", "1f1b"])
def test_a_loaded_checkpoint_goes_on_as_if_it_had_never_stopped(schedule: str, tmp_path: Path) -> None:
    case = Case((0, 2, 6), schedule, accumulation=2, steps=6)
    for straight, resumed in run_ranks(train_twice, 2, case, str(tmp_path)):
        assert straight["losses"][3:] == resumed["losses"]
        for part in ("stage", "aux"):
            assert straight[part].keys() == resumed[part].keys()
            for key, weight in straight[part].items():
                assert np.array_equal(weight, resumed[part][key]), key


def train_twice(case: Case, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Six steps with a checkpoint after the third; then a new engine that loads it and takes the last three."""
    stream = case.replica_batches(0)
    engine = build(case)
    data = iter(stream)
    losses = []
    for step in range(case.steps):
        losses.append(float(engine.train_batch(data)))
        if step == 2:
            engine.save_checkpoint(folder, tag="three")
    engine.drain()
    straight = {"losses": losses, **weights(engine)}
    engine = build(case)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    engine.load_checkpoint(folder, tag="three")
    data = iter(stream[3 * case.accumulation :])
    losses = [float(engine.train_batch(data)) for _ in range(3)]
    engine.drain()
    return straight, {"losses": losses, **weights(engine)}
