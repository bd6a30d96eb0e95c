"""The greedy engine against plain greedy training: float64, one process, no engine, no message, no wavefront.

Batch by batch every stage takes what the stage before has made with its weights of that batch, before its update:

    loss_k = cross-entropy(head_(k+1)(X_(k+1)), y),  X_(k+1) = F_k(X_k detached)        last stage: the network's scores
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsaux.models import build_layer
from tests.multiprocess.test_penalty_numerics import learning_rate
from tests.ranks import run_ranks
from tests.small_engine import Case, build, trained, weights
from tests.small_net import small_heads, small_layers

pytestmark = pytest.mark.multiprocess
TOLERANCE = 1e-10  # float64, ten ticks: rounding differs by the order of sums only

BOUNDS = {2: (0, 3, 6), 3: (0, 2, 4, 6), 4: (0, 1, 2, 5, 6)}
RATES = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 10,
            "warmup_num_steps": 3,
            "warmup_min_lr": 0.01,
            "warmup_max_lr": 0.05,
            "warmup_type": "linear",
        },
    }
}


def local(stages: int, **options: Any) -> Case:
    """Ten ticks, the drain included."""
    return Case(BOUNDS[stages], "local", **{"steps": 11 - stages, **options})


CASES = {
    "two stages": local(2),
    "three stages": local(3),
    "four stages, uneven": local(4),
    "two stages, two micro-batches": local(2, accumulation=2),
    "three stages, two micro-batches": local(3, accumulation=2),
    "four stages, two micro-batches": local(4, accumulation=2),
    "two stages, two replicas, two micro-batches": local(2, replicas=2, accumulation=2),
    "fewer batches than stages": local(4, steps=2),
    "drained on the way, at once and with fewer batches than stages": local(3, steps=8, drain_after=(1, 3, 7)),
    "no clipping": local(3, changes={"gradient_clipping": 0.0}),
    "a learning-rate schedule": local(3, steps=8, drain_after=(5,), changes=RATES),
}


@functools.cache
def results(world_size: int) -> dict[str, list[dict[str, Any]]]:
    return trained(CASES, world_size)


@pytest.mark.parametrize("name", CASES)
def test_ten_ticks_equal_synchronous_greedy_training(name: str) -> None:
    case = CASES[name]
    expected = simulate(case)
    for rank, got in enumerate(results(case.world_size)[name]):
        np.testing.assert_allclose(got["losses"], known_losses(case, expected["losses"]), rtol=TOLERANCE)
        assert got["mismatches"] == [[]] * case.steps, "there is no AuxNet to mismatch"
        assert got["aux"] == {}
        assert got["stage"], f"rank {rank} holds no layer"
        for key, weight in got["stage"].items():
            np.testing.assert_allclose(weight, expected["stage"][key], rtol=TOLERANCE, atol=TOLERANCE)
        stage = case.bounds.index(min(index for index, _ in got["stage"]))
        heads = [*expected["heads"], {}]
        assert got["head"].keys() == heads[stage].keys(), "the last stage has the network's own head"
        for key, weight in got["head"].items():
            np.testing.assert_allclose(weight, heads[stage][key], rtol=TOLERANCE, atol=TOLERANCE)


def known_losses(case: Case, losses: list[float]) -> list[float]:
    """What the calls return: NaN, then the loss of the batch that came to the last stage; a drain lets all come."""
    found, seen = [], float("nan")
    for first, behind in itertools.pairwise([0, *case.drain_after, case.steps]):
        for step in range(first, behind):
            newest = step - (case.num_stages - 1)
            if newest >= first:
                seen = losses[newest]
            found.append(seen)
        if behind > first:
            seen = losses[behind - 1]
    return found


def test_the_simulation_moves_every_weight_and_is_no_back_propagation() -> None:
    """Guards the comparison above."""
    case = CASES["three stages"]
    before, after = simulate(replace(case, steps=0)), simulate(case)
    assert all(np.abs(after["stage"][key] - before["stage"][key]).max() > 1e-4 for key in before["stage"])
    for old, new in zip(before["heads"], after["heads"], strict=True):
        assert all(np.abs(new[key] - old[key]).max() > 1e-5 for key in old)
    one = simulate(replace(case, bounds=(0, 6)))
    assert any(np.abs(after["stage"][key] - one["stage"][key]).max() > 1e-3 for key in one["stage"])


def test_bf16_on_the_way_halves_the_message_and_changes_little() -> None:
    case = local(3, dtype=torch.float32, steps=3)
    short = replace(case, changes={"dsaux": {"aux": {"transport": "bf16"}}})
    for full, half in run_ranks(sent_and_output, 3, case, short):
        assert 2 * (half["bytes"] - half["head_bytes"]) == full["bytes"] - full["head_bytes"]
        for key, weight in full["stage"].items():
            np.testing.assert_allclose(half["stage"][key], weight, atol=0.02)  # bf16 has 8 bits


def sent_and_output(full: Case, half: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bytes that this rank has sent, those of the scales among them, and the weights of its stage."""
    found = []
    for case in (full, half):
        engine = build(case)
        data = iter(case.replica_batches(0))
        for _ in range(case.steps):
            engine.train_batch(data)
        engine.drain()
        sent = 0 if engine.sender is None else engine.sender.sent_bytes
        head_bytes = 0 if engine.sender is None else 8 * case.steps
        found.append({"bytes": sent, "head_bytes": head_bytes, **weights(engine)})
    return found[0], found[1]


# ---- the simulation -----------------------------------------------------------------------------------------------


def simulate(case: Case) -> dict[str, Any]:
    """Synchronous greedy training in one process: batch by batch, stage by stage, replica by replica."""
    document = case.document()
    layers = [build_layer(layer, index, seed=0).double() for index, layer in enumerate(small_layers())]
    stages = [nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(case.bounds)]
    heads = [head.double() for head in small_heads(list(case.bounds))]
    parts = [nn.ModuleList([stage, *heads[k : k + 1]]) for k, stage in enumerate(stages)]
    optimizers = [torch.optim.SGD(part.parameters(), **document["optimizer"]["params"]) for part in parts]
    count = case.replicas * case.accumulation
    streams = [case.replica_batches(replica) for replica in range(case.replicas)]
    losses = []
    for step in range(case.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = 0.0
        for replica, micro in itertools.product(range(case.replicas), range(case.accumulation)):
            x, labels = streams[replica][step * case.accumulation + micro]
            for k, stage in enumerate(stages):
                made = stage(x)
                scores = made if k == len(heads) else heads[k](made)
                local_loss = F.cross_entropy(scores, labels) / count
                local_loss.backward()
                x = made.detach()
            loss += local_loss.item()
        losses.append(loss)
        for part, optimizer in zip(parts, optimizers, strict=True):
            if document["gradient_clipping"] > 0:
                nn.utils.clip_grad_norm_(part.parameters(), document["gradient_clipping"])
            if "scheduler" in document:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(document["scheduler"]["params"], step)
            optimizer.step()
    named = [(index, name, weight) for index, layer in enumerate(layers) for name, weight in layer.named_parameters()]
    return {
        "losses": losses,
        "stage": {(index, name): weight.detach().numpy() for index, name, weight in named},
        "heads": [{name: weight.detach().numpy() for name, weight in head.named_parameters()} for head in heads],
    }
