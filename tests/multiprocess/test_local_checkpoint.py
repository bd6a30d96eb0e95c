"""Checkpoints of greedy runs: heads follow their cuts, and a run goes over from and to another method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsaux.checkpoint import find_checkpoint
from tests.ranks import run_ranks
from tests.small_engine import Case, build

pytestmark = pytest.mark.multiprocess
STEPS = 4
LOCAL = Case((0, 2, 4, 6), "local", steps=STEPS)


@pytest.mark.parametrize("drain", [True, False], ids=["drained", "with batches under way"])
@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ("al", "local", "The local heads of the cuts at layers 2, 4 start anew: the checkpoint, written under al"),
        ("local", "al", "The checkpoint has no AuxNet (it was written under local): the AuxNet starts anew."),
    ],
)
def test_a_run_goes_over_to_another_method_with_a_note(
    before: str, after: str, note: str, drain: bool, tmp_path: Path
) -> None:
    run_ranks(save, 3, replace(LOCAL, schedule=before), str(tmp_path), drain)
    for rank in run_ranks(load_and_train, 3, replace(LOCAL, schedule=after), str(tmp_path)):
        assert any(note in text for text in rank["notes"])
        assert any("batches that were under way are dropped" in text for text in rank["notes"]) == (not drain)
        assert rank["step"] == STEPS, "all stages go on from the batches that had entered"
        assert rank["layers_are_the_saved_ones"]
        assert np.isfinite(rank["last_loss"])


def test_heads_follow_the_cuts_that_have_stayed(tmp_path: Path) -> None:
    run_ranks(save, 3, LOCAL, str(tmp_path), True)
    first, second, last = run_ranks(load_and_train, 3, replace(LOCAL, bounds=(0, 2, 5, 6)), str(tmp_path))
    assert first["head_is_saved_with_momentum"] == (True, True)
    assert second["head_is_saved_with_momentum"] == (False, False)
    assert last["head_is_saved_with_momentum"] is None
    for rank in (first, second, last):
        assert any("heads of the cuts at layers 5 start anew" in text for text in rank["notes"])
        assert np.isfinite(rank["last_loss"])


def save(case: Case, folder: str, drain: bool) -> None:
    """Train, save."""
    engine = build(case)
    data = iter(case.replica_batches(0))
    for _ in range(case.steps):
        engine.train_batch(data)
    engine.save_checkpoint(folder, drain=drain)


def load_and_train(case: Case, folder: str) -> dict[str, Any]:
    """Load into an engine of another shape or method, look at what has come, and train."""
    engine = build(case)
    engine.load_checkpoint(folder)
    found = find_checkpoint(Path(folder))
    result: dict[str, Any] = {"notes": engine.restored_notes, "step": engine.global_steps}
    same = []
    for offset, layer in enumerate(engine.module.forward_funcs):
        saved = found.load(f"layer_{engine.module._local_start + offset:02d}-model_states.pt")
        same += [torch.equal(tensor, saved[name]) for name, tensor in layer.state_dict().items()]
    result["layers_are_the_saved_ones"] = all(same)
    result["head_is_saved_with_momentum"] = None
    if engine.module.local_head is not None:
        name = f"head_{engine.module.parts[engine.stage_id + 1]:02d}-model_states.pt"
        saved = found.load(name) if name in found.files else {}
        head = engine.module.local_head
        weights = [key in saved and torch.equal(tensor, saved[key]) for key, tensor in head.state_dict().items()]
        momenta = ["momentum_buffer" in engine.optimizer.state[parameter] for parameter in head.parameters()]
        result["head_is_saved_with_momentum"] = all(weights), all(momenta)
    data = iter(case.replica_batches(0))
    for _ in range(case.steps):
        loss = engine.train_batch(data)
    engine.drain()
    result["last_loss"] = float(loss)
    return result
