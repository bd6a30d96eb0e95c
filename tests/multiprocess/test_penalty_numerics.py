"""The penalty engine against the formulas: float64, one process, no engine, no message.

lambda_0 = x,  lambda_k = T_k(lambda_(k-1)),  X_(k+1) = F_k(lambda_k)
loss_k   = beta/(2 D v) mean_b ||X_(k+1) - lambda_(k+1)||^2          (last stage: cross-entropy)
force at tap k = gamma g_k + rho/(D v) (lambda_k - X_k)/B            pushed back through T_k .. T_1
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.models import build_layer
from tests.ranks import run_ranks
from tests.small_engine import Case, train
from tests.small_net import small_aux_net, small_layers

pytestmark = pytest.mark.multiprocess
TOLERANCE = 1e-10  # float64, five steps: rounding differs by the order of sums only

CASES = {
    "two stages": Case((0, 3, 6)),
    "three stages": Case((0, 2, 4, 6)),
    "four stages, uneven": Case((0, 1, 2, 5, 6)),
    "two stages, four micro-batches": Case((0, 3, 6), accumulation=4),
    "three stages, two micro-batches": Case((0, 1, 4, 6), accumulation=2),
    "two stages, two replicas": Case((0, 3, 6), replicas=2),
    "two stages, two replicas, two micro-batches": Case((0, 2, 6), replicas=2, accumulation=2),
    "other coefficients": Case((0, 3, 6), changes={"dsaux": {"aux": {"beta": 3.0, "rho": 0.5, "gamma": 0.7}}}),
    "unscaled": Case((0, 2, 4, 6), changes={"dsaux": {"aux": {"scaled": False}}}),
    "no clipping": Case((0, 2, 4, 6), changes={"gradient_clipping": 0.0}),
    "an optimizer of its own for the AuxNet": Case(
        (0, 3, 6), changes={"dsaux": {"aux": {"optimizer": {"type": "Adam", "params": {"lr": 0.003}}}}}
    ),
    "a learning-rate schedule": Case(
        (0, 3, 6),
        changes={
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {
                    "total_num_steps": 5,
                    "warmup_num_steps": 2,
                    "warmup_min_lr": 0.01,
                    "warmup_max_lr": 0.05,
                    "warmup_type": "linear",
                },
            }
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_the_formulas(name: str) -> None:
    case = CASES[name]
    expected = reference(case)
    ranks = run_ranks(train, case.world_size, case)
    for rank, got in enumerate(ranks):
        np.testing.assert_allclose(got["losses"], expected["losses"], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(got["mismatches"], expected["mismatches"], rtol=TOLERANCE, atol=TOLERANCE)
        assert got["stage"], f"rank {rank} holds no layer"
        for key, weight in got["stage"].items():
            np.testing.assert_allclose(weight, expected["stage"][key], rtol=TOLERANCE, atol=TOLERANCE)
        for key, weight in got["aux"].items():
            np.testing.assert_allclose(weight, expected["aux"][key], rtol=TOLERANCE, atol=TOLERANCE)
    held = {key for got in ranks for key in got["stage"]}
    assert held == set(expected["stage"]), "together the ranks hold the whole network"


def test_weights_do_move() -> None:
    """Guards the comparison above: both sides must have left the weights they started from."""
    case = CASES["two stages"]
    before, after = reference(dataclasses.replace(case, steps=0)), reference(case)
    assert all(np.abs(after["stage"][key] - before["stage"][key]).max() > 1e-4 for key in before["stage"])
    assert all(np.abs(after["aux"][key] - before["aux"][key]).max() > 1e-4 for key in before["aux"])


def test_one_and_four_micro_batches_differ_by_batchnorm_alone() -> None:
    """Without BatchNorm's batch statistics a step of four micro-batches is the step of one batch."""
    whole = reference(CASES["two stages"])
    parts = reference(CASES["two stages, four micro-batches"])
    assert any(np.abs(whole["stage"][key] - parts["stage"][key]).max() > 1e-6 for key in whole["stage"])


# ---- the reference ----------------------------------------------------------------------------------------------


def reference(case: Case) -> dict[str, Any]:
    """The whole method in one process, stage by stage, micro-batch by micro-batch, replica by replica."""
    document = case.document()
    settings = {"beta": 10.0, "rho": 1.0, "gamma": 1.0, "scaled": True, "optimizer": None} | document["dsaux"].get(
        "aux", {}
    )
    layers = [build_layer(layer, index, seed=0).double() for index, layer in enumerate(small_layers())]
    stages = [nn.Sequential(*layers[a:b]) for a, b in zip(case.bounds, case.bounds[1:], strict=False)]
    aux = small_aux_net(list(case.bounds)).double()
    base = document["optimizer"]["params"]
    optimizers = [torch.optim.SGD(stage.parameters(), **base) for stage in stages]
    if settings["optimizer"] is None:
        optimizers.append(torch.optim.SGD(aux.parameters(), **base))
    else:
        # DeepSpeed's meaning of "Adam" holds for DeepSpeed's block; in dsaux.aux.optimizer it is torch.optim's.
        optimizers.append(
            getattr(torch.optim, settings["optimizer"]["type"])(aux.parameters(), **settings["optimizer"]["params"])
        )
    running: list[Tensor | None] = [None] * (case.num_stages - 1)
    count = case.replicas * case.accumulation
    streams = [case.replica_batches(replica) for replica in range(case.replicas)]
    losses, mismatches = [], []
    for step in range(case.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            if "scheduler" in document:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(document["scheduler"]["params"], step)
        variances = torch.zeros(case.num_stages - 1, dtype=torch.float64)
        mismatch = torch.zeros(case.num_stages - 1, dtype=torch.float64)
        loss = 0.0
        for stream in streams:
            for inputs, labels in stream[step * case.accumulation : (step + 1) * case.accumulation]:
                found = one_micro_batch(stages, aux, inputs, labels, running=running, count=count, **settings)
                loss += found["loss"] / count
                variances += found["variances"] / count
                mismatch += found["mismatch"] / count
        clip = document["gradient_clipping"]
        if clip > 0:
            for module in (*stages, aux):
                nn.utils.clip_grad_norm_(module.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
        running = [v if old is None else 0.98 * old + 0.02 * v for old, v in zip(running, variances, strict=True)]
        losses.append(loss)
        mismatches.append(mismatch.tolist())
    return {"losses": losses, "mismatches": mismatches, **weights_of(layers, aux)}


def weights_of(layers: list[nn.Module], aux: nn.Module) -> dict[str, Any]:
    """Weights as :func:`tests.small_engine.weights` gives those of a rank."""
    stage = {
        (index, name): parameter.detach().numpy()
        for index, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    }
    return {"stage": stage, "aux": {name: tensor.detach().numpy() for name, tensor in aux.state_dict().items()}}


def one_micro_batch(
    stages: list[nn.Module],
    aux: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    running: list[Tensor | None],
    count: int,
    beta: float,
    rho: float,
    gamma: float,
    scaled: bool,
    optimizer: Any,
) -> dict[str, Any]:
    """Add the gradients of one micro-batch, each `count`-th of a mean, to the stages and the AuxNet."""
    size, last = len(inputs), len(stages) - 1
    variables = [inputs, *aux(inputs)]
    scale = []
    for boundary, variable in enumerate(variables[1:]):
        v = variable.detach().var(unbiased=False) if running[boundary] is None else running[boundary]
        scale.append(v if scaled else torch.ones(()).double())
    forces: list[Tensor] = [torch.zeros_like(variable) for variable in variables]
    mismatch = torch.zeros(last, dtype=torch.float64)
    loss = 0.0
    for k, stage in enumerate(stages):
        own_input = variables[k].detach().requires_grad_()
        made = stage(own_input)
        if k == last:
            local = F.cross_entropy(made, labels)
            loss = local.item()
        else:
            target = variables[k + 1].detach()
            d = target[0].numel()
            local = beta / (2 * d * scale[k]) * (made - target).square().flatten(1).sum(dim=1).mean()
            forces[k + 1] += rho / (d * scale[k]) * (target - made.detach()) / size / count
            mismatch[k] = (made - target).square().mean().item() / made.detach().var(unbiased=False).item()
        (local / count).backward()
        forces[k] += gamma * own_input.grad
    torch.autograd.backward(variables[1:], forces[1:])
    variances = torch.stack([variable.detach().var(unbiased=False) for variable in variables[1:]])
    return {"loss": loss, "variances": variances, "mismatch": mismatch}


def learning_rate(params: dict[str, Any], step: int) -> float:
    """DeepSpeed's WarmupDecayLR with linear warm-up; its first two steps both take the lowest rate."""
    low, high, warmup = params["warmup_min_lr"], params["warmup_max_lr"], params["warmup_num_steps"]
    iteration = max(0, step - 1)
    if iteration < warmup:
        return low + (high - low) * iteration / warmup
    return low + (high - low) * max(0.0, (params["total_num_steps"] - iteration) / (params["total_num_steps"] - warmup))
