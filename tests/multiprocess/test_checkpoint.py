"""Checkpoints of the engine: a run goes on to the bit, or in another shape from the same weights; damage is found."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsaux.checkpoint import CheckpointError, find_checkpoint
from dsaux.config import ConfigError
from dsaux.engine_state import collect
from tests.ranks import run_ranks
from tests.small_engine import Case, build, train, weights

pytestmark = pytest.mark.multiprocess

SAVED_AFTER, STEPS = 3, 7
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
COSINE = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2}}}
CYCLE = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "scheduler": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": 0.002, "cycle_max_lr": 0.02, "cycle_first_step_size": 4},
    },
}
ZERO = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
BF16 = {"bf16": {"enabled": True}}
SINGLE = torch.float32

CASES = {
    "penalty, 2 stages": Case((0, 2, 6), "penalty", accumulation=2),
    "al, 2 stages, schedule": Case((0, 2, 6), "al", changes=COSINE),
    "1f1b, 2 stages": Case((0, 2, 6), "1f1b", accumulation=2, changes=COSINE),
    "al, overlap": Case((0, 2, 6), "al", changes={"dsaux": {"aux": {"overlap": True}}}),
    "al, Adam": Case((0, 2, 6), "al", changes=ADAM),
    "al, bf16": Case((0, 2, 6), "al", dtype=SINGLE, changes=BF16),
    "al, bf16 on the way": Case((0, 2, 6), "al", dtype=SINGLE, changes={"dsaux": {"aux": {"transport": "bf16"}}}),
    "local, 2 stages, schedule": Case((0, 2, 6), "local", accumulation=2, changes=COSINE),
    "local, Adam": Case((0, 2, 6), "local", changes=ADAM),
    "al, momentum in a cycle": Case((0, 2, 6), "al", changes=CYCLE),
    "local, momentum in a cycle": Case((0, 2, 6), "local", changes=CYCLE),
    "local, bf16": Case((0, 2, 6), "local", dtype=SINGLE, changes=BF16),
    "local, 3 stages, 2 micro-batches": Case((0, 2, 4, 6), "local", accumulation=2),
    "local, 4 stages": Case((0, 1, 2, 4, 6), "local"),
    "local, ZeRO-1": Case((0, 2, 6), "local", replicas=2, dtype=SINGLE, changes=ZERO),
    "penalty, 1 stage": Case((0, 6), "penalty", replicas=2),
    "al, 3 stages, 2 micro-batches": Case((0, 2, 4, 6), "al", accumulation=2),
    "al, 3 stages, overlap": Case((0, 2, 4, 6), "al", changes={"dsaux": {"aux": {"overlap": True}}}),
    "penalty, 2 replicas": Case((0, 2, 6), "penalty", replicas=2),
    "al, 2 replicas": Case((0, 2, 6), "al", replicas=2),
    "1f1b, 2 replicas": Case((0, 2, 6), "1f1b", replicas=2, accumulation=2),
    "al, ZeRO-1": Case((0, 2, 6), "al", replicas=2, dtype=SINGLE, changes=ZERO),
    "penalty, ZeRO-1, Adam": Case((0, 2, 6), "penalty", replicas=2, dtype=SINGLE, changes={**ZERO, **ADAM}),
    "penalty, ZeRO-1, momentum in a cycle": Case(
        (0, 2, 6), "penalty", replicas=2, dtype=SINGLE, changes={**ZERO, **CYCLE}
    ),
    "1f1b, ZeRO-1": Case((0, 2, 6), "1f1b", replicas=2, accumulation=2, dtype=SINGLE, changes=ZERO),
    "penalty, a frozen stage": Case((0, 2, 6), "penalty", frozen=(2, 3, 4, 5)),
    "al, bf16, a frozen layer": Case((0, 2, 6), "al", dtype=SINGLE, changes=BF16, frozen=(1,)),
    "1f1b, ZeRO-1, a frozen layer": Case((0, 2, 6), "1f1b", replicas=2, dtype=SINGLE, changes=ZERO, frozen=(2,)),
    "al, bf16, ZeRO-1": Case((0, 2, 6), "al", replicas=2, dtype=SINGLE, changes={**BF16, **ZERO}),
}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_run_that_is_resumed_equals_one_that_never_stopped_to_the_bit(world_size: int, tmp_path: Path) -> None:
    cases = {name: replace(case, steps=STEPS) for name, case in CASES.items() if case.world_size == world_size}
    assert cases
    for rank in run_ranks(never_stopped_saved_and_resumed, world_size, cases, str(tmp_path)):
        for name, (never_stopped, saved, resumed) in rank.items():
            assert_equal(never_stopped, saved, f"{name}: to save has changed the run")
            assert never_stopped["losses"][SAVED_AFTER:] == resumed.pop("losses"), f"{name}: losses"
            assert_equal(never_stopped, resumed, f"{name}: resumed")


def never_stopped_saved_and_resumed(cases: dict[str, Case], folder: str) -> dict[str, tuple[dict[str, Any], ...]]:
    """Three runs of each case: undisturbed; saved on the way with batches under way; a new engine from there."""
    found = {}
    for number, (name, case) in enumerate(cases.items()):
        where = f"{folder}/{number}"

        def save(engine: Any, step: int, where: str = where) -> None:
            if step + 1 == SAVED_AFTER:
                engine.save_checkpoint(where, tag="three", drain=False, client_state={"own": torch.arange(3)})

        found[name] = train(case), train(case, each_step=save), resume(case, where)
    return found


def resume(case: Case, folder: str) -> dict[str, Any]:
    """The rest of a run from the checkpoint in `folder`, in an engine whose weights were spoilt."""
    engine = build(case)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    path, client_state = engine.load_checkpoint(folder)
    assert path == f"{folder}/three"
    assert client_state["own"].tolist() == [0, 1, 2]
    assert engine.restored_notes == []
    data = iter(case.replica_batches(engine.grid.get_data_parallel_rank())[engine.global_steps * case.accumulation :])
    losses, mismatches = [], []
    for _ in range(case.steps - SAVED_AFTER):
        losses.append(float(engine.train_batch(data)))
        mismatches.append(engine.boundary_mismatch.tolist())
    engine.drain()
    return {"losses": losses, **weights(engine)}


def assert_equal(one: dict[str, Any], other: dict[str, Any], what: str) -> None:
    """Losses, if both have them, and all weights are the same bits."""
    if "losses" in other:
        assert np.array_equal(one["losses"], other["losses"], equal_nan=True), what
    for part in ("stage", "aux", "head"):
        assert one[part].keys() == other[part].keys()
        for key, weight in one[part].items():
            assert np.array_equal(weight, other[part][key]), f"{what}: {key}"


@pytest.mark.parametrize(("schedule", "changes"), [("al", COSINE), ("local", COSINE), ("al", CYCLE)])
def test_a_run_goes_on_in_the_middle_of_its_exact_tail(schedule: str, changes: dict[str, Any], tmp_path: Path) -> None:
    case = Case((0, 2, 6), schedule, steps=STEPS, changes=changes)
    for straight, resumed in run_ranks(stop_in_the_exact_tail, 2, case, str(tmp_path)):
        assert straight["losses"][-2:] == resumed.pop("losses")
        assert straight.pop("rates")[-2:] == resumed.pop("rates")
        assert_equal(straight, resumed, "exact tail")


def stop_in_the_exact_tail(case: Case, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three steps of a local schedule, four exact ones, saved in the middle of them; and a new engine from there."""
    stream = case.replica_batches(0)

    def go_on(engine: Any, first: int, last: int) -> dict[str, Any]:
        data, losses, rates = iter(stream[first:]), [], []
        for step in range(first, last):
            if step == 3:
                engine.use_exact_schedule(lr=0.02, num_steps=4)
            losses.append(float(engine.train_batch(data)))
            rates.append(float(engine.get_lr()[0]))
            if step == 4:
                engine.save_checkpoint(folder)
        engine.drain()
        return {"losses": losses, "rates": rates, **weights(engine)}

    straight = go_on(build(case), 0, case.steps)
    engine = build(case)
    engine.load_checkpoint(folder)
    assert engine.schedule_name == "1f1b"
    return straight, go_on(engine, 5, case.steps)


# ---- another shape --------------------------------------------------------------------------------------------------

RESHAPED = {
    "other bounds": (Case((0, 2, 6), "1f1b", accumulation=2), Case((0, 3, 6), "1f1b", accumulation=2)),
    "more stages": (Case((0, 2, 6), "1f1b", accumulation=2), Case((0, 2, 4, 6), "1f1b", accumulation=2)),
    "more replicas": (Case((0, 2, 6), "1f1b", accumulation=2), Case((0, 2, 6), "1f1b", replicas=2)),
    "Adam, other bounds": (Case((0, 2, 6), "1f1b", changes=ADAM), Case((0, 4, 6), "1f1b", changes=ADAM)),
    "ZeRO-1 to none": (
        Case((0, 2, 6), "1f1b", replicas=2, dtype=SINGLE, changes=ZERO),
        Case((0, 3, 6), "1f1b", accumulation=2, dtype=SINGLE),
    ),
    "none to ZeRO-1": (
        Case((0, 3, 6), "1f1b", accumulation=2, dtype=SINGLE),
        Case((0, 2, 6), "1f1b", replicas=2, dtype=SINGLE, changes=ZERO),
    ),
    "a frozen layer, ZeRO-1 to none": (
        Case((0, 2, 6), "1f1b", replicas=2, dtype=SINGLE, changes=ZERO, frozen=(2,)),
        Case((0, 3, 4, 6), "1f1b", accumulation=2, dtype=SINGLE, frozen=(2,)),
    ),
    "a frozen layer, none to ZeRO-1": (
        Case((0, 3, 4, 6), "1f1b", accumulation=2, dtype=SINGLE, frozen=(2,)),
        Case((0, 2, 6), "1f1b", replicas=2, dtype=SINGLE, changes=ZERO, frozen=(2,)),
    ),
}
"""Exact back-propagation does not depend on the cut: the run in the new shape must follow the old one."""


@pytest.mark.parametrize("name", RESHAPED)
def test_layers_and_their_optimizer_state_follow_into_another_shape(name: str, tmp_path: Path) -> None:
    # Clipped by the norm of a stage, the gradients would depend on the cut.
    before, after = (
        replace(case, steps=STEPS, changes={**case.changes, "gradient_clipping": 0.0}) for case in RESHAPED[name]
    )
    straight = run_ranks(save_and_go_on, before.world_size, before, str(tmp_path))
    moved = run_ranks(load_and_go_on, after.world_size, after, str(tmp_path))
    # BatchNorm over the micro-batches of the two shapes is the same: they have one size. Float32 sums differ in order.
    tolerance = 1e-9 if before.dtype == torch.float64 else 1e-4
    for rank in moved:
        assert any("dealt anew" in note for note in rank["notes"])
        for key, weight in rank["stage"].items():
            matching = [other["stage"][key] for other in straight if key in other["stage"]]
            np.testing.assert_allclose(weight, matching[0], rtol=0, atol=tolerance, err_msg=f"{name}: {key}")


def save_and_go_on(case: Case, folder: str) -> dict[str, Any]:
    """Train with a checkpoint on the way."""

    def save(engine: Any, step: int) -> None:
        if step + 1 == SAVED_AFTER:
            engine.save_checkpoint(folder, drain=False)

    return train(case, each_step=save)


def load_and_go_on(case: Case, folder: str) -> dict[str, Any]:
    """The rest of it in this shape."""
    engine = build(case)
    engine.load_checkpoint(folder)
    stream = case.replica_batches(engine.grid.get_data_parallel_rank())
    data = iter(stream[engine.global_steps * case.accumulation :])
    losses = [float(engine.train_batch(data)) for _ in range(case.steps - SAVED_AFTER)]
    engine.drain()
    return {"losses": losses, "notes": engine.restored_notes, **weights(engine)}


def test_the_auxnet_keeps_the_segments_whose_boundaries_have_stayed(tmp_path: Path) -> None:
    before, after = Case((0, 2, 4, 6), "al", steps=STEPS), Case((0, 2, 5, 6), "al", steps=STEPS)
    run_ranks(save_and_go_on, 3, before, str(tmp_path))
    kept, notes, finite = run_ranks(segments_after_loading, 3, after, str(tmp_path))[0]
    assert kept == {0: True, 1: False}
    assert any("segments 2 of 2 start anew" in note for note in notes)
    assert any("2 batches that were under way are dropped" in note for note in notes)
    assert finite


def segments_after_loading(case: Case, folder: str) -> tuple[dict[int, bool], list[str], bool]:
    """For each segment whether it has the checkpoint's weights and momentum; the notes; whether training goes on."""
    saved = find_checkpoint(Path(folder)).load("aux_net-model_states.pt")
    engine = build(case)
    engine.load_checkpoint(folder)
    files = collect(engine, {})
    kept = {}
    for index, segment in enumerate(engine.module.aux_net.segments):
        same = [torch.equal(tensor, saved[f"segments.{index}.{name}"]) for name, tensor in segment.state_dict().items()]
        if engine.global_rank == 0:
            optimizer = files["aux_net-optim_states.pt"]["optimizer"]
            own = [entry for name, entry in optimizer.items() if name.startswith(f"segments.{index}.")]
            momenta = [bool(entry["state"]) for entry in own]
            assert all(momenta) == all(same)
        kept[index] = all(same)
    data = iter(case.replica_batches(0))
    losses = [float(engine.train_batch(data)) for _ in range(3)]
    return kept, engine.restored_notes, bool(np.isfinite(losses).all())


# ---- damage and failure ---------------------------------------------------------------------------------------------


def test_a_rank_that_cannot_write_fails_on_all_ranks_and_the_former_checkpoint_stays(tmp_path: Path) -> None:
    case = Case((0, 2, 6), "al", steps=STEPS)
    ranks = run_ranks(fill_the_disk_of_one_rank, 2, case, str(tmp_path))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["first", "latest"]
    for message, survivor, after in ranks:
        assert "rank 1: File too large" in message
        assert survivor == "first"
        assert np.isfinite(after)


def fill_the_disk_of_one_rank(case: Case, folder: str) -> tuple[str, str, float]:
    """A checkpoint that succeeds; one in which rank 1 may write no more than 2 KB a file; then a step of training."""
    engine = build(case)
    data = iter(case.replica_batches(0))
    engine.train_batch(data)
    engine.save_checkpoint(folder, tag="first", drain=False)
    engine.train_batch(data)
    if engine.global_rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    message = ""
    try:
        engine.save_checkpoint(folder, tag="second", drain=False)
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found = find_checkpoint(Path(folder))
    return message, found.path.name, float(engine.train_batch(data))


def test_the_checkpoint_before_is_loaded_where_the_newest_is_damaged(tmp_path: Path) -> None:
    case = Case((0, 2, 6), "penalty", steps=STEPS)
    run_ranks(save_twice, 2, case, str(tmp_path))
    file = tmp_path / "global_step2" / "layer_00-model_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for path, notes, steps in run_ranks(load_whatever_is_whole, 2, case, str(tmp_path)):
        assert path.endswith("global_step1")
        assert steps == 1
        assert len(notes) == 1
        assert str(file) in notes[0]
    (tmp_path / "global_step1" / "manifest.json").unlink()
    for message in run_ranks(load_nothing, 2, case, str(tmp_path)):
        assert "has no checkpoint that is whole" in message
        assert str(file) in message


def save_twice(case: Case, folder: str) -> None:
    """Checkpoints after the first and the second step."""
    engine = build(case)
    data = iter(case.replica_batches(0))
    for _ in range(2):
        engine.train_batch(data)
        engine.save_checkpoint(folder)


def load_whatever_is_whole(case: Case, folder: str) -> tuple[str, list[str], int]:
    """Load without a name."""
    engine = build(case)
    path, _ = engine.load_checkpoint(folder)
    return path, engine.restored_notes, engine.global_steps


def load_nothing(case: Case, folder: str) -> str:
    """The error of a load."""
    engine = build(case)
    with pytest.raises(ConfigError) as error:
        engine.load_checkpoint(folder)
    return str(error.value)
