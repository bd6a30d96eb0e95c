"""The AuxNet's replicas stay equal, whatever DeepSpeed option is on; and the options train."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import RankError, run_ranks
from tests.small_engine import Case, build, train
from tests.small_net import small_aux_net

pytestmark = pytest.mark.multiprocess

ZERO_1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
BF16 = {"bf16": {"enabled": True}}
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "ZeRO-1": ZERO_1,
    "bf16": BF16,
    "bf16 and ZeRO-1": BF16 | ZERO_1,
    "Adam": {"optimizer": {"type": "Adam", "params": {"lr": 0.003, "torch_adam": True}}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_auxnet_replicas_are_bit_identical_after_20_steps(options: str, replicas: int) -> None:
    case = Case((0, 3, 6), replicas=replicas, accumulation=2, steps=20, dtype=torch.float32, changes=OPTIONS[options])
    first, *others = run_ranks(train, case.world_size, case)
    assert first["aux"]
    for other in others:
        assert first["losses"] == other["losses"]
        for name, weight in first["aux"].items():
            assert np.array_equal(weight, other["aux"][name]), name
    untrained = small_aux_net([0, 3, 6]).state_dict()
    assert not any(np.array_equal(weight, untrained[name].numpy()) for name, weight in first["aux"].items())


@pytest.mark.parametrize("stages", [3, 4])
def test_auxnet_replicas_are_bit_identical_with_more_stages(stages: int) -> None:
    case = Case((0, 2, 4, 6) if stages == 3 else (0, 1, 2, 5, 6), steps=20, dtype=torch.float32)
    first, *others = run_ranks(train, case.world_size, case)
    for other in others:
        for name, weight in first["aux"].items():
            assert np.array_equal(weight, other["aux"][name]), name


def test_stage_replicas_hold_equal_weights() -> None:
    case = Case((0, 3, 6), replicas=2, steps=5, dtype=torch.float32)
    ranks = run_ranks(train, 4, case)
    by_layer: dict[Any, list[np.ndarray]] = {}
    for rank in ranks:
        for key, weight in rank["stage"].items():
            by_layer.setdefault(key, []).append(weight)
    assert all(len(copies) == 2 for copies in by_layer.values())
    assert all(np.array_equal(*copies) for copies in by_layer.values())


def test_zero_1_gives_the_weights_of_zero_0() -> None:
    """Same sums in another order: float32 rounding over five steps, hence 1e-5."""
    plain = run_ranks(train, 4, Case((0, 3, 6), replicas=2, dtype=torch.float32))
    partitioned = run_ranks(train, 4, Case((0, 3, 6), replicas=2, dtype=torch.float32, changes=ZERO_1))
    for one, two in zip(plain, partitioned, strict=True):
        for key, weight in one["stage"].items():
            np.testing.assert_allclose(two["stage"][key], weight, rtol=1e-4, atol=1e-5)


def test_bf16_follows_float32() -> None:
    """bf16 has 8 bits of mantissa: losses agree to a few per cent over five steps."""
    full = run_ranks(train, 2, Case((0, 3, 6), dtype=torch.float32))
    half = run_ranks(train, 2, Case((0, 3, 6), dtype=torch.float32, changes=BF16))
    np.testing.assert_allclose(half[0]["losses"], full[0]["losses"], rtol=0.05)
    assert half[0]["losses"] != full[0]["losses"]


def test_different_batches_on_the_ranks_of_a_replica_are_found_in_the_first_step() -> None:
    with pytest.raises(
        RankError, match=r"saw different batches in step 0 \(rank 0: [0-9a-f]{6}, rank 1: [0-9a-f]{6}\)"
    ):
        run_ranks(train_on_own_batches, 2, Case((0, 3, 6)), 0)


def test_different_batches_are_found_at_the_next_guarded_step() -> None:
    case = Case((0, 3, 6), steps=6, changes={"dsaux": {"data": {"guard_every": 4}}})
    with pytest.raises(RankError, match="saw different batches in step 4"):
        run_ranks(train_on_own_batches, 2, case, 2)


def test_1f1b_compares_the_batches_of_first_and_last_stage_too() -> None:
    with pytest.raises(RankError, match="saw different batches"):
        run_ranks(train_on_own_batches, 2, Case((0, 3, 6), "1f1b"), 0)


def train_on_own_batches(case: Case, first_wrong_step: int) -> float:
    engine = build(case)
    right = case.replica_batches(0)
    wrong = case.replica_batches(0, seed=100 + engine.global_rank)
    data = iter([*right[:first_wrong_step], *wrong[first_wrong_step:]])
    loss = math.nan
    for _ in range(case.steps):
        loss = float(engine.train_batch(data))
    return loss
