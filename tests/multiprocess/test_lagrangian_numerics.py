"""The augmented Lagrangian engine against the formulas: float64, one process, no engine, no message.

Stage k treats batch t-(K-1-k) in tick t, with its own weights of exactly that batch and the AuxNet of tick t:

    tick      0     1     2     3     4     5     6
    stage 0   .     .     FB0   FB1   FB2   FB3   FB4
    stage 1   .     FB0   FB1   FB2   FB3   FB4   .
    stage 2   FB0   FB1   FB2   FB3   FB4   .     .

    loss_k      = beta/(2 D v) mean_b ||X_(k+1) - lambda'_(k+1)||^2      of tick t-1; last stage: cross-entropy
    lambda'_k   = lambda_k - (D v / beta) B g_k
    force at tap k = gamma g_k + rho/(D v) (lambda_k - X_k)/B            summed over the ranks, each with its own batch
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.assemble import cross_entropy
from dsaux.bootstrap import initialize
from dsaux.models import build_layer
from dsaux.models.auxnet import AuxNet
from dsaux.module import AuxPipelineModule
from tests.multiprocess.test_penalty_numerics import learning_rate, weights_of
from tests.ranks import run_ranks
from tests.small_engine import Case, trained
from tests.small_net import small_aux_net, small_layers

pytestmark = pytest.mark.multiprocess
TOLERANCE = 1e-10  # float64, ten ticks: rounding differs by the order of sums only

BOUNDS = {2: (0, 3, 6), 3: (0, 2, 4, 6), 4: (0, 1, 2, 5, 6)}
OVERLAP = {"dsaux": {"aux": {"overlap": True}}}
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


def al(stages: int, **options: Any) -> Case:
    """Ten ticks, the drain included."""
    return Case(BOUNDS[stages], "al", **{"steps": 11 - stages, **options})


CASES = {
    "two stages": al(2),
    "three stages": al(3),
    "four stages, uneven": al(4),
    "two stages, four micro-batches": al(2, accumulation=4),
    "three stages, two micro-batches": al(3, accumulation=2),
    "three stages, two replicas": al(3, replicas=2, steps=5),
    "two stages, two replicas, two micro-batches": al(2, replicas=2, accumulation=2),
    "fewer batches than stages": al(4, steps=2),
    "one batch": al(3, steps=1),
    "drained on the way, at once and with fewer batches than stages": al(3, steps=8, drain_after=(1, 3, 7)),
    "other coefficients": al(3, changes={"dsaux": {"aux": {"beta": 3.0, "rho": 0.5, "gamma": 0.7}}}),
    "unscaled": al(3, changes={"dsaux": {"aux": {"scaled": False}}}),
    "no clipping": al(3, changes={"gradient_clipping": 0.0}),
    "an optimizer of its own for the AuxNet": al(
        2, changes={"dsaux": {"aux": {"optimizer": {"type": "Adam", "params": {"lr": 0.003}}}}}
    ),
    "a learning-rate schedule": al(3, steps=8, drain_after=(5,), changes=RATES),
    "overlap, two stages": al(2, changes=OVERLAP),
    "overlap, four stages": al(4, changes=OVERLAP),
    "overlap, three stages, two micro-batches, drained on the way": al(
        3, accumulation=2, drain_after=(1, 3), changes=OVERLAP | RATES
    ),
}


@functools.cache
def results(world_size: int) -> dict[str, list[dict[str, Any]]]:
    return trained(CASES, world_size)


@pytest.mark.parametrize("name", CASES)
def test_ten_ticks_equal_the_formulas(name: str) -> None:
    case = CASES[name]
    expected = simulate(case)
    for rank, got in enumerate(results(case.world_size)[name]):
        np.testing.assert_allclose(got["losses"], expected["losses"], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(got["mismatches"], expected["mismatches"], rtol=TOLERANCE, atol=TOLERANCE)
        assert got["stage"], f"rank {rank} holds no layer"
        for key, weight in got["stage"].items():
            np.testing.assert_allclose(weight, expected["stage"][key], rtol=TOLERANCE, atol=TOLERANCE)
        for key, weight in got["aux"].items():
            np.testing.assert_allclose(weight, expected["aux"][key], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_simulation_is_no_penalty_and_moves_every_weight() -> None:
    """Guards the comparison above."""
    case = CASES["three stages"]
    before, after = simulate(replace(case, steps=0)), simulate(case)
    assert all(np.abs(after["stage"][key] - before["stage"][key]).max() > 1e-4 for key in before["stage"])
    assert all(np.abs(after["aux"][key] - before["aux"][key]).max() > 1e-4 for key in before["aux"])
    late = simulate(replace(case, changes=OVERLAP))
    assert any(np.abs(after["aux"][key] - late["aux"][key]).max() > 1e-6 for key in before["aux"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_with_copies_of_the_stages_as_auxnet_the_gradients_are_those_of_back_propagation(
    stages: int, accumulation: int
) -> None:
    """lambda_k = X_k: the adjoint that goes up is exact, the coupling force is zero. Learning rate 0 keeps the copy."""
    case = al(stages, accumulation=accumulation, steps=4)
    modules = [build_layer(layer, index, seed=0).double() for index, layer in enumerate(small_layers())]
    network = nn.Sequential(*modules)
    held: set[tuple[int, str]] = set()
    for rank in run_ranks(gradients_with_a_perfect_auxnet, stages, case):
        assert len(rank) == case.steps, "one gradient for every batch, none lost in fill or drain"
        for step, gradients in enumerate(rank):
            network.zero_grad()
            for inputs, labels in case.replica_batches(0)[step * accumulation : (step + 1) * accumulation]:
                (F.cross_entropy(network(inputs), labels) / accumulation).backward()
            for (index, name), gradient in gradients.items():
                exact = dict(modules[index].named_parameters())[name].grad
                np.testing.assert_allclose(gradient, exact.numpy(), rtol=TOLERANCE, atol=TOLERANCE)
                assert np.abs(gradient).max() > 1e-6
                held.add((index, name))
    assert held == {(index, name) for index, layer in enumerate(modules) for name, _ in layer.named_parameters()}


def gradients_with_a_perfect_auxnet(case: Case) -> list[dict[tuple[int, str], np.ndarray]]:
    """This rank's gradients, one entry for each of its batches, taken where the optimizer steps."""
    layers = small_layers()
    segments = [
        nn.Sequential(*(build_layer(layers[index], index, seed=0) for index in range(first, last)))
        for first, last in itertools.pairwise(case.bounds[:-1])
    ]
    for segment in segments:
        for layer in segment.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    module = AuxPipelineModule(
        layers, num_stages=case.num_stages, bounds=case.bounds, loss_fn=cross_entropy, aux_net=AuxNet(segments)
    ).to(case.dtype)
    engine, _, _, _ = initialize(model=module, config={**case.document(), "gradient_clipping": 0.0})
    for group in (*engine.optimizer.param_groups, *engine.aux.optimizer.param_groups):
        group["lr"] = 0.0
    found = []
    step = engine.optimizer.step

    def record(*args: Any, **kwargs: Any) -> Any:
        gradients = {}
        for name, parameter in engine.module.named_parameters():
            index, inner = name.split(".", 1)
            gradients[int(index), inner] = parameter.grad.numpy().copy()
        found.append(gradients)
        return step(*args, **kwargs)

    engine.optimizer.step = record
    data = iter(case.replica_batches(0))
    for _ in range(case.steps):
        engine.train_batch(data)
    engine.drain()
    return found


# ---- the simulation -----------------------------------------------------------------------------------------------


def simulate(case: Case) -> dict[str, Any]:
    """The wavefront in one process: tick by tick, stage by stage, replica by replica, micro-batch by micro-batch."""
    document = case.document()
    settings: dict[str, Any] = {"beta": 10.0, "rho": 1.0, "gamma": 1.0, "scaled": True}
    settings |= document["dsaux"].get("aux", {})
    num_stages, last = case.num_stages, case.num_stages - 1
    layers = [build_layer(layer, index, seed=0).double() for index, layer in enumerate(small_layers())]
    stages = [nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(case.bounds)]
    aux = small_aux_net(list(case.bounds)).double()
    base = document["optimizer"]["params"]
    optimizers = [torch.optim.SGD(stage.parameters(), **base) for stage in stages]
    own = settings.get("optimizer") or {"type": "SGD", "params": base}
    aux_optimizer = getattr(torch.optim, own["type"])(aux.parameters(), **own["params"])
    count = case.replicas * case.accumulation
    streams = [case.replica_batches(replica) for replica in range(case.replicas)]
    running = torch.full((last,), math.nan, dtype=torch.float64)
    shown = torch.full((last,), math.nan, dtype=torch.float64)
    seen = 0.0  # the last loss that is known
    losses: list[float] = []
    mismatches: list[list[float]] = []
    pending: list[tuple[list[Tensor], int]] = []  # sums of AuxNet gradients that have not been applied yet

    def aux_step(gradients: list[Tensor], rate_step: int) -> None:
        for parameter, gradient in zip(aux.parameters(), gradients, strict=True):
            parameter.grad = gradient
        clip_and_step(aux, aux_optimizer, rate_step)

    def clip_and_step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if document["gradient_clipping"] > 0:
            nn.utils.clip_grad_norm_(module.parameters(), document["gradient_clipping"])
        if "scheduler" in document:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(document["scheduler"]["params"], step)
        optimizer.step()

    reports: list[tuple[float | None, list[bool], Tensor, Tensor]] = []
    for first, behind in itertools.pairwise([0, *case.drain_after, case.steps]):
        size = behind - first
        messages: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        for tick in range(size + last if size else 0):
            sent: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
            for parameter in itertools.chain(*(module.parameters() for module in (*stages, aux))):
                parameter.grad = torch.zeros_like(parameter)
            variances, mismatch = torch.zeros(2, last, dtype=torch.float64)
            loss, has_boundary = 0.0, [False] * last
            active = [k for k in range(num_stages) if 0 <= tick - (last - k) < size]
            for k, replica, micro in itertools.product(active, range(case.replicas), range(case.accumulation)):
                step = first + tick - (last - k)
                inputs, labels = streams[replica][step * case.accumulation + micro]
                variables = [inputs, *aux(inputs)]
                own_input = variables[k].detach().requires_grad_()
                made = stages[k](own_input)
                forces = {}
                if k == last:
                    local = F.cross_entropy(made, labels)
                    loss += local.item() / count
                else:
                    refreshed, v = messages[k, replica, micro]
                    target = variables[k + 1].detach()
                    d = target[0].numel()
                    local = settings["beta"] / (2 * d * v) * (made - refreshed).square().flatten(1).sum(dim=1).mean()
                    own_v = scale_of(target, running[k], scaled=settings["scaled"])
                    forces[k + 1] = settings["rho"] / (d * own_v) * (target - made.detach()) / len(inputs) / count
                    variances[k] += target.var(unbiased=False) / count
                    mismatch[k] += (made - target).square().mean().item() / made.var(unbiased=False).item() / count
                    has_boundary[k] = True
                gradients = torch.autograd.grad(local, [own_input, *stages[k].parameters()])
                for parameter, gradient in zip(stages[k].parameters(), gradients[1:], strict=True):
                    parameter.grad += gradient / count
                if k > 0:
                    forces[k] = settings["gamma"] * gradients[0] / count
                    v = scale_of(variables[k].detach(), running[k - 1], scaled=settings["scaled"])
                    d = variables[k][0].numel()
                    adjoint = d * v / settings["beta"] * len(inputs) * gradients[0]
                    sent[k - 1, replica, micro] = variables[k].detach() - adjoint, v
                torch.autograd.backward([variables[tap] for tap in forces], list(forces.values()))
            messages = sent
            for k in active:
                clip_and_step(stages[k], optimizers[k], first + tick - (last - k))
            # Sums come in order; an overlapped one is applied a tick later, but for the first and the last tick.
            pending.append(([p.grad.clone() for p in aux.parameters()], min(first + tick, behind)))
            reports.append((loss if last in active else None, has_boundary, variances, mismatch))
            holds = settings.get("overlap", False) and 0 < tick < size + last - 1
            while len(pending) > holds:
                aux_step(*pending.pop(0))
                new_loss, has, variances, mismatch = reports.pop(0)
                for k in range(last):
                    if has[k]:
                        running[k] = variances[k] if running[k].isnan() else 0.98 * running[k] + 0.02 * variances[k]
                        shown[k] = mismatch[k]
                seen = seen if new_loss is None else new_loss
            if tick < size:
                losses.append(seen)
                mismatches.append(shown.tolist())
    return {"losses": losses, "mismatches": mismatches, **weights_of(layers, aux)}


def scale_of(variable: Tensor, running: Tensor, *, scaled: bool) -> Tensor:
    """v of a boundary: the running variance, the batch's own where there is none yet, 1 in the unscaled form."""
    if not scaled:
        return torch.ones((), dtype=torch.float64)
    return variable.var(unbiased=False) if running.isnan() else running.clone()
