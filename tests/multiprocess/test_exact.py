"""The 1f1b schedule, one stage, and the switch between schedules, against plain back-propagation in one process."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsaux.engine import AuxPipelineEngine
from dsaux.models import build_layer
from tests.ranks import run_ranks
from tests.small_engine import Case, build, train, weights
from tests.small_net import small_layers

pytestmark = pytest.mark.multiprocess
TOLERANCE = 1e-10  # float64, five steps: rounding differs by the order of sums only
LOSS_TOLERANCE = 1e-6  # DeepSpeed hands the loss to the other stages in float32, whatever the weights are

CASES = {
    "two stages": Case((0, 3, 6), "1f1b"),
    "three stages, four micro-batches": Case((0, 2, 4, 6), "1f1b", accumulation=4),
    "four stages, uneven": Case((0, 1, 2, 5, 6), "1f1b", accumulation=2),
    "two stages, two replicas": Case((0, 3, 6), "1f1b", replicas=2, accumulation=2),
    "no clipping": Case((0, 3, 6), "1f1b", accumulation=2, changes={"gradient_clipping": 0.0}),
    "one stage": Case((0, 6)),
    "one stage, four micro-batches": Case((0, 6), accumulation=4),
    "one stage, two replicas": Case((0, 6), replicas=2),
    "one stage under 1f1b": Case((0, 6), "1f1b"),
}


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_plain_back_propagation(name: str) -> None:
    case = CASES[name]
    losses, expected = back_propagation(case)
    held = {}
    for got in run_ranks(train, case.world_size, case):
        np.testing.assert_allclose(got["losses"], losses, rtol=LOSS_TOLERANCE)
        held |= got["stage"]
        assert got["mismatches"] == [[]] * case.steps
    assert set(held) == set(expected)
    for key, weight in held.items():
        np.testing.assert_allclose(weight, expected[key], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_switch_to_exact_steps_goes_on_with_true_gradients_and_its_own_learning_rate() -> None:
    """From the weights and momenta that three penalty steps left, two exact steps equal plain ones."""
    case = Case((0, 3, 6))
    ranks = run_ranks(switch_after_three_steps, 2, case, 0.02)
    modules = [build_layer(layer, index, seed=0).double() for index, layer in enumerate(small_layers())]
    optimizers = []
    for rank, (first, last) in enumerate(((0, 3), (3, 6))):
        stage = nn.Sequential(*modules[first:last])
        optimizer = torch.optim.SGD(stage.parameters(), **case.document()["optimizer"]["params"])
        optimizers.append(optimizer)
        for (name, parameter), state in zip(stage.named_parameters(), ranks[rank]["momenta"], strict=True):
            index, inner = name.split(".", 1)
            parameter.data.copy_(torch.from_numpy(ranks[rank]["before"]["stage"][int(index) + first, inner]))
            optimizer.state[parameter]["momentum_buffer"] = torch.from_numpy(state)
    losses = []
    for step, (inputs, labels) in enumerate(case.replica_batches(0)[3:]):
        rate = 0.5 * 0.02 * (1 + np.cos(np.pi * step / 2))
        losses.append(plain_step(modules, optimizers, [(inputs, labels)], bounds=case.bounds, clip=0.5, lr=rate))
    assert ranks[0]["methods"] == ["penalty"] * 3 + ["1f1b"] * 2
    for rank in (0, 1):
        np.testing.assert_allclose(ranks[rank]["losses"], losses, rtol=LOSS_TOLERANCE)
        for (index, name), weight in ranks[rank]["after"]["stage"].items():
            expected = dict(modules[index].named_parameters())[name].detach().numpy()
            np.testing.assert_allclose(weight, expected, rtol=TOLERANCE, atol=TOLERANCE)


def switch_after_three_steps(case: Case, lr: float) -> dict[str, Any]:
    engine = build(case)
    data = iter(case.replica_batches(0))
    methods = []
    for _ in range(3):
        methods.append(engine.schedule_name)
        engine.train_batch(data)
    before = weights(engine)
    before = {**before, "stage": {key: value.copy() for key, value in before["stage"].items()}}
    momenta = [engine.optimizer.state[p]["momentum_buffer"].numpy().copy() for p in engine.module.parameters()]
    engine.use_exact_schedule(lr=lr, num_steps=2)
    losses = []
    for _ in range(2):
        methods.append(engine.schedule_name)
        losses.append(float(engine.train_batch(data)))
    return {"before": before, "momenta": momenta, "after": weights(engine), "losses": losses, "methods": methods}


def test_activation_checkpointing_changes_no_weight() -> None:
    plain = Case((0, 3, 6))
    saved = Case(
        (0, 3, 6),
        changes={"activation_checkpointing": {"number_checkpoints": 2}},
        module_options={"activation_checkpoint_interval": 1},
    )
    for one, two in zip(run_ranks(train, 2, plain), run_ranks(train, 2, saved), strict=True):
        for key, weight in one["stage"].items():
            np.testing.assert_allclose(two["stage"][key], weight, rtol=TOLERANCE, atol=TOLERANCE)
        for key, weight in one["aux"].items():
            np.testing.assert_allclose(two["aux"][key], weight, rtol=TOLERANCE, atol=TOLERANCE)


def test_eval_batch_runs_the_real_chain_without_the_auxnet() -> None:
    case = Case((0, 2, 4, 6))
    losses, outputs = zip(*run_ranks(evaluate_once, 3, case), strict=True)
    modules = nn.Sequential(*(build_layer(layer, index, seed=0).double() for index, layer in enumerate(small_layers())))
    inputs, labels = case.replica_batches(0)[0]
    with torch.no_grad():
        expected = float(F.cross_entropy(modules.eval()(inputs), labels))
    np.testing.assert_allclose(losses, [expected] * 3, rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose(outputs, [[-expected]] * 3, rtol=TOLERANCE)


def evaluate_once(case: Case) -> tuple[float, list[float]]:
    """`eval_batch` as DeepSpeed's users call it, then `forward_chain` with an output function of ours."""
    engine: AuxPipelineEngine = build(case)
    batch = case.replica_batches(0)[0]
    engine.module.eval()
    loss = float(engine.eval_batch(iter([batch])))
    total = engine.forward_chain(
        iter([batch]), lambda scores, labels: -F.cross_entropy(scores, labels).reshape(1), num_micro_batches=1
    )
    values = torch.zeros(1, dtype=torch.float64) if total is None else total
    torch.distributed.broadcast(values, src=torch.distributed.get_world_size() - 1)
    return loss, values.tolist()


# ---- the reference ----------------------------------------------------------------------------------------------


def back_propagation(case: Case) -> tuple[list[float], dict[tuple[int, str], np.ndarray]]:
    """Losses and weights of plain training; gradients clipped for each stage's layers, as in the engine."""
    document = case.document()
    modules = [build_layer(layer, index, seed=0).double() for index, layer in enumerate(small_layers())]
    optimizers = [
        torch.optim.SGD(nn.Sequential(*modules[a:b]).parameters(), **document["optimizer"]["params"])
        for a, b in zip(case.bounds, case.bounds[1:], strict=False)
    ]
    streams = [case.replica_batches(replica) for replica in range(case.replicas)]
    losses = []
    for step in range(case.steps):
        parts = [
            part for stream in streams for part in stream[step * case.accumulation : (step + 1) * case.accumulation]
        ]
        losses.append(plain_step(modules, optimizers, parts, bounds=case.bounds, clip=document["gradient_clipping"]))
    expected = {
        (index, name): parameter.detach().numpy()
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }
    return losses, expected


def plain_step(
    modules: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    bounds: tuple[int, ...],
    clip: float,
    lr: float | None = None,
) -> float:
    """One step of back-propagation over micro-batches; returns the mean loss."""
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
    total = 0.0
    for inputs, labels in parts:
        loss = F.cross_entropy(nn.Sequential(*modules)(inputs), labels) / len(parts)
        loss.backward()
        total += loss.item()
    for a, b in itertools.pairwise(bounds):
        if clip > 0:
            nn.utils.clip_grad_norm_(nn.Sequential(*modules[a:b]).parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
    return total
