"""The augmented Lagrangian schedule in a run: options, drains, transfers, and ranks that are slow at random."""

from __future__ import annotations

import functools
import random
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dsaux.engine import AuxPipelineEngine
from tests.multiprocess.test_replicas import OPTIONS, ZERO_1
from tests.ranks import RankError, run_ranks
from tests.small_engine import Case, build, train, trained, weights
from tests.small_net import small_aux_net

pytestmark = pytest.mark.multiprocess

OVERLAP = {"dsaux": {"aux": {"overlap": True}}}
SOAK_TICKS = 2000
SOAK_LIMIT_S = 400.0


def float32(bounds: tuple[int, ...], **options: Any) -> Case:
    return Case(bounds, "al", dtype=torch.float32, **options)


def assert_auxnet_replicas_are_equal(ranks: list[dict[str, Any]], bounds: tuple[int, ...]) -> None:
    first, *others = ranks
    assert first["aux"]
    for other in others:
        for name, weight in first["aux"].items():
            assert np.array_equal(weight, other["aux"][name]), name
    untrained = small_aux_net(list(bounds)).state_dict()
    assert not any(np.array_equal(weight, untrained[name].numpy()) for name, weight in first["aux"].items())


# ---- DeepSpeed's options ------------------------------------------------------------------------------------------


@functools.cache
def results(world_size: int) -> dict[str, list[dict[str, Any]]]:
    cases = {
        name: float32((0, 3, 6), replicas=world_size // 2, accumulation=2, steps=20, changes=changes)
        for name, changes in OPTIONS.items()
    }
    return trained(cases, world_size)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_auxnet_replicas_are_bit_identical_after_20_ticks_and_a_drain(options: str, replicas: int) -> None:
    ranks = results(2 * replicas)[options]
    assert_auxnet_replicas_are_equal(ranks, (0, 3, 6))
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)


def test_stage_replicas_hold_equal_weights() -> None:
    ranks = run_ranks(train, 4, float32((0, 3, 6), replicas=2))
    by_layer: dict[Any, list[np.ndarray]] = {}
    for rank in ranks:
        for key, weight in rank["stage"].items():
            by_layer.setdefault(key, []).append(weight)
    assert all(len(copies) == 2 and np.array_equal(*copies) for copies in by_layer.values())


def test_zero_1_gives_the_weights_of_zero_0() -> None:
    """Same sums in another order: float32 rounding over five steps, hence 1e-5."""
    plain = run_ranks(train, 4, float32((0, 3, 6), replicas=2))
    partitioned = run_ranks(train, 4, float32((0, 3, 6), replicas=2, changes=ZERO_1))
    for one, two in zip(plain, partitioned, strict=True):
        for key, weight in one["stage"].items():
            np.testing.assert_allclose(two["stage"][key], weight, rtol=1e-4, atol=1e-5)


def test_bf16_follows_float32() -> None:
    """bf16 has 8 bits of mantissa: losses agree to a few per cent over five steps."""
    full = run_ranks(train, 3, float32((0, 2, 4, 6)))
    half = run_ranks(train, 3, float32((0, 2, 4, 6), changes=OPTIONS["bf16"]))
    np.testing.assert_allclose(half[0]["losses"], full[0]["losses"], rtol=0.05)
    assert half[0]["losses"] != full[0]["losses"]


def test_activation_checkpointing_changes_no_weight() -> None:
    """float64, rounding only."""
    plain = Case((0, 2, 4, 6), "al")
    saved = replace(plain, module_options={"activation_checkpoint_interval": 1})
    for one, two in zip(run_ranks(train, 3, plain), run_ranks(train, 3, saved), strict=True):
        for part in ("stage", "aux"):
            for key, weight in one[part].items():
                np.testing.assert_allclose(two[part][key], weight, rtol=1e-10, atol=1e-10)


def test_bf16_transport_halves_the_bytes_and_stays_close() -> None:
    """lambda' loses all but 8 bits of its mantissa on the way, nothing else changes: weights move by a little."""
    case = float32((0, 2, 4, 6))
    changes = {"dsaux": {"aux": {"transport": "bf16"}}}
    full = run_ranks(train_and_count_bytes, 3, case)
    half = run_ranks(train_and_count_bytes, 3, replace(case, changes=changes))
    for (one, sent), (two, sent_half) in zip(full, half, strict=True):
        head = 8 * case.steps  # one scale of eight bytes in each message
        assert sent_half == (sent - head) // 2 + head if sent else sent_half == 0
        for key, weight in one["stage"].items():
            np.testing.assert_allclose(two["stage"][key], weight, atol=0.01)
    assert any(not np.array_equal(half[0][0]["stage"][key], full[0][0]["stage"][key]) for key in full[0][0]["stage"])


def train_and_count_bytes(case: Case) -> tuple[dict[str, Any], int]:
    sent = [0]

    def look(engine: AuxPipelineEngine, step: int) -> None:
        sent[0] = engine.sender.sent_bytes if engine.sender else 0

    result = train(case, each_step=look)
    # The last batches are sent in the drain: one message for each batch by every stage but the first.
    return result, sent[0] // max(1, sent_batches(case)) * case.steps if sent[0] else 0


def sent_batches(case: Case) -> int:
    """Messages that this rank has sent before the drain."""
    rank = torch.distributed.get_rank()
    return case.steps - (case.num_stages - 1 - rank)


# ---- filling and draining -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_every_stage_has_taken_every_step_after_the_drain_however_few(steps: int) -> None:
    case = float32((0, 1, 2, 5, 6), steps=steps)
    counts = run_ranks(count_steps, 4, case)
    lags = [3, 2, 1, 0]
    assert [before for before, _ in counts] == [max(0, steps - lag) for lag in lags]
    assert [after for _, after in counts] == [steps] * 4


def count_steps(case: Case) -> tuple[int, int]:
    engine = build(case)
    data = iter(case.replica_batches(0))
    for _ in range(case.steps):
        engine.train_batch(data)
    before = int(engine.global_steps)
    engine.drain()
    engine.drain()  # nothing is left to do
    return before, int(engine.global_steps)


def test_an_evaluation_drains_first_and_training_goes_on() -> None:
    case = float32((0, 2, 4, 6), steps=6)
    drained = run_ranks(train, 3, replace(case, drain_after=(3,)))
    evaluated = run_ranks(evaluate_after_three_steps, 3, case)
    for one, two in zip(drained, evaluated, strict=True):
        assert one["losses"] == two["losses"]
        for part in ("stage", "aux"):
            for key, weight in one[part].items():
                assert np.array_equal(weight, two[part][key]), key


def evaluate_after_three_steps(case: Case) -> dict[str, Any]:
    engine = build(case)
    batches = case.replica_batches(0)
    data = iter(batches)
    losses = []
    for step in range(case.steps):
        losses.append(float(engine.train_batch(data)))
        if step == 2:
            with torch.no_grad():
                engine.eval_batch(iter(batches[:1]))
            assert engine.wavefront.is_empty
    engine.drain()
    return {"losses": losses, **weights(engine)}


def test_a_new_iterator_may_come_while_batches_of_the_old_one_are_under_way() -> None:
    case = float32((0, 2, 4, 6), steps=6)
    for one, two in zip(run_ranks(train, 3, case), run_ranks(train_on_two_iterators, 3, case), strict=True):
        assert one["losses"] == two["losses"]
        for key, weight in one["stage"].items():
            assert np.array_equal(weight, two["stage"][key]), key


def train_on_two_iterators(case: Case) -> dict[str, Any]:
    engine = build(case)
    batches = case.replica_batches(0)
    losses = [float(engine.train_batch(data)) for data in [iter(batches[:2])] * 2]
    losses += [float(engine.train_batch(data)) for data in [iter(batches[2:])] * 4]
    engine.drain()
    return {"losses": losses, **weights(engine)}


def test_the_switch_to_exact_steps_drains_first() -> None:
    steps = run_ranks(switch_to_exact, 3, float32((0, 2, 4, 6), steps=4, accumulation=2))
    assert steps == [(4, "1f1b", 5)] * 3


def switch_to_exact(case: Case) -> tuple[int, str, int]:
    engine = build(case)
    batches = case.replica_batches(0)
    data = iter(batches)
    for _ in range(case.steps):
        engine.train_batch(data)
    engine.use_exact_schedule(lr=0.01, num_steps=1)
    drained = int(engine.global_steps)
    engine.train_batch(iter(batches))
    return drained, engine.schedule_name, int(engine.global_steps)


def test_another_number_of_micro_batches_takes_effect_after_a_drain() -> None:
    results = run_ranks(change_batch_size, 2, float32((0, 3, 6), steps=2))
    assert results == [(2, 4, True)] * 2


def change_batch_size(case: Case) -> tuple[int, int, bool]:
    engine = build(case)
    batches = replace(case, steps=20).replica_batches(0)
    data = iter(batches)
    for _ in range(2):
        engine.train_batch(data)
    engine.set_train_batch_size(3 * engine.train_batch_size())
    drained = int(engine.global_steps)
    losses = [float(engine.train_batch(data)) for _ in range(2)]
    engine.drain()
    return drained, int(engine.global_steps), bool(np.isfinite(losses).all())


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_different_batches_on_the_ranks_of_a_replica_are_found_when_the_last_of_them_has_treated_the_batch() -> None:
    with pytest.raises(
        RankError, match=r"saw different batches in step 0 \(rank 0: [0-9a-f]{6}, rank 1: [0-9a-f]{6}\)"
    ):
        run_ranks(train_on_own_batches, 2, float32((0, 3, 6)))


def train_on_own_batches(case: Case) -> None:
    engine = build(case)
    data = iter(case.replica_batches(0, seed=100 + engine.global_rank))
    for _ in range(case.steps):
        engine.train_batch(data)


def test_a_batch_of_another_shape_is_refused_with_the_mend() -> None:
    with pytest.raises(RankError, match="Training batches must have one shape: drop the last, incomplete one"):
        run_ranks(train_with_a_short_last_batch, 2, float32((0, 3, 6)))


def train_with_a_short_last_batch(case: Case) -> None:
    engine = build(case)
    *whole, (inputs, labels) = case.replica_batches(0)
    data = iter([*whole, (inputs[:5], labels[:5])])
    for _ in range(case.steps):
        engine.train_batch(data)
    engine.drain()


# ---- slow ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ticks", "changes"), [(SOAK_TICKS, {}), (500, OVERLAP)], ids=["2000", "500 with overlap"])
def test_random_delays_change_nothing_in_many_ticks_on_four_ranks(ticks: int, changes: dict[str, Any]) -> None:
    """No deadlock; and no reordering: the same bits as without delays; and the AuxNet's replicas stay equal."""
    case = float32((0, 1, 2, 5, 6), steps=ticks, drain_after=(300, 303), changes=changes)
    delayed = run_ranks(train_with_delays, 4, case, 0.002, time_limit_s=SOAK_LIMIT_S)
    assert_auxnet_replicas_are_equal(delayed, case.bounds)
    straight = run_ranks(train_with_delays, 4, case, 0.0, time_limit_s=SOAK_LIMIT_S)
    for one, two in zip(straight, delayed, strict=True):
        assert one["losses"] == two["losses"]
        assert len(one["losses"]) == ticks
        for key, weight in one["stage"].items():
            assert np.array_equal(weight, two["stage"][key]), key


def train_with_delays(case: Case, longest_s: float) -> dict[str, Any]:
    """Train on a few batches over and over; every rank sleeps at random before and behind its transfers and sums."""
    engine = build(case)
    if longest_s:
        chance = random.Random(engine.global_rank)
        for kind, method in list(engine._INSTRUCTION_MAP.items()):
            if kind.__name__ in ("SendVariable", "RecvVariable", "WaitRecvVariable", "ReduceAuxGrads", "LocalBackward"):
                engine._INSTRUCTION_MAP[kind] = _delayed(method, chance, longest_s)
    batches = replace(case, steps=8).replica_batches(0)
    data = (batches[index % len(batches)] for index in range(case.steps))
    losses = []
    for step in range(case.steps):
        losses.append(float(engine.train_batch(data)))
        if step + 1 in case.drain_after:
            engine.drain()
    engine.drain()
    return {"losses": losses, **weights(engine)}


def _delayed(method: Any, chance: random.Random, longest_s: float) -> Any:
    def call(engine: AuxPipelineEngine, **kwargs: Any) -> None:
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.0, longest_s))
        method(engine, **kwargs)

    return call
