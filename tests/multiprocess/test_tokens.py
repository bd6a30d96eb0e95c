"""A small GPT in float64 on two ranks: 1f1b is back-propagation, local is greedy; al fills, drains, stays equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsaux.assemble import cross_entropy
from dsaux.bootstrap import initialize
from dsaux.config import ModelConfig
from dsaux.models import Layer, boundary_specs, build_layer, build_layers
from dsaux.models.auxnet import build_aux_net
from dsaux.models.causality import with_causality
from dsaux.models.local_heads import build_local_heads
from dsaux.models.shapes import SampleSpec
from dsaux.module import AuxPipelineModule
from tests.ranks import run_ranks
from tests.small_engine import weights
from tests.small_net import small_config

pytestmark = pytest.mark.multiprocess
TOLERANCE = 1e-10  # float64, four steps: rounding differs by the order of sums only
LOSS_TOLERANCE = 1e-6  # DeepSpeed hands the loss to the other stages in float32, whatever the weights are
SPEC = SampleSpec((6,), causal=True, vocabulary=11)
BOUNDS, STEPS, BATCH = (0, 2, 4), 4, 8


class Transposed(nn.Module):
    """A block whose output does not lie in memory row by row, as patches of images do not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x).transpose(1, 2).contiguous().transpose(1, 2)
        return out


def layers() -> list[Layer]:
    """Embedding, two blocks, head; the working directory of a test run is the repository's root."""
    settings = ModelConfig("examples/gpt.py:gpt", args={"layers": 2, "heads": 2, "dim": 16})
    found = build_layers(settings, num_classes=11, input_spec=SPEC)
    found[1] = replace(found[1], make=lambda make=found[1].make: Transposed(make()))  # the last of its stage
    return with_causality(found, input_spec=SPEC, network=settings.name)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Rows of whole numbers, and as labels the numbers that follow."""
    rows = torch.randint(11, (STEPS, BATCH, 7), generator=torch.Generator().manual_seed(5))
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def document(schedule: str) -> dict[str, Any]:
    """Two micro-batches a step under 1f1b; clipping is by stage there, so it is left out."""
    return small_config(
        stages=2,
        batch=BATCH,
        accumulation=2 if schedule == "1f1b" else 1,
        gradient_clipping=0.0,
        dsaux={"pipeline": {"schedule": schedule}, "aux": {"beta": 5.0}},
    )


def train(schedule: str) -> dict[str, Any]:
    """Train on this rank."""
    network = layers()
    after = boundary_specs(network, input_spec=SPEC)
    assert after[1].causal
    own = {"aux_net": build_aux_net([SPEC, after[1]])} if schedule == "al" else {}
    own |= {"local_heads": build_local_heads([after[1]], scores=after[-1])} if schedule == "local" else {}
    module = AuxPipelineModule(network, num_stages=2, bounds=BOUNDS, loss_fn=cross_entropy, **own).double()
    engine, _, _, _ = initialize(model=module, config=document(schedule))
    parts = 2 if schedule == "1f1b" else 1
    data = iter([part for row, nxt in batches() for part in zip(row.chunk(parts), nxt.chunk(parts), strict=True)])
    losses, under_way = [], []
    for _ in range(STEPS):
        losses.append(float(engine.train_batch(data)))
        under_way.append(not engine.wavefront.is_empty)
    before = engine.global_steps
    engine.drain()
    mismatch = engine.boundary_mismatch.tolist()
    tokens, hits = engine.train_samples, float(engine.train_hits)
    found = {"losses": losses, "under_way": under_way, "steps": (before, engine.global_steps), "mismatch": mismatch}
    return {**found, "tokens": tokens, "hits": hits, "empty": engine.wavefront.is_empty, **weights(engine)}


def train_both() -> dict[str, dict[str, Any]]:
    """All schedules in the same processes: starting ranks costs more than training."""
    return {schedule: train(schedule) for schedule in ("1f1b", "al", "local")}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    """What each rank gave."""
    found: list[dict[str, dict[str, Any]]] = run_ranks(train_both, 2)
    return found


def test_1f1b_on_two_ranks_equals_plain_back_propagation(ranks: list[dict[str, dict[str, Any]]]) -> None:
    modules = torch.nn.Sequential(*(build_layer(one, index, seed=0) for index, one in enumerate(layers()))).double()
    optimizer = torch.optim.SGD(modules.parameters(), **document("1f1b")["optimizer"]["params"])
    losses = []
    for row, following in batches():
        optimizer.zero_grad()
        loss = cross_entropy(modules(row), following)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = {name: weight.detach().numpy() for name, weight in modules.named_parameters()}
    held: dict[str, Any] = {}
    for rank in ranks:
        got = rank["1f1b"]
        np.testing.assert_allclose(got["losses"], losses, rtol=LOSS_TOLERANCE)
        held |= {f"{index}.{name}": weight for (index, name), weight in got["stage"].items()}
    assert set(held) == set(expected)
    for name, weight in held.items():
        np.testing.assert_allclose(weight, expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_local_on_two_ranks_equals_plain_greedy_training(ranks: list[dict[str, dict[str, Any]]]) -> None:
    modules = [build_layer(one, index, seed=0).double() for index, one in enumerate(layers())]
    after = boundary_specs(layers(), input_spec=SPEC)
    (head,) = build_local_heads([after[1]], scores=after[-1])
    first, second = nn.Sequential(*modules[:2]), nn.Sequential(*modules[2:])
    parts = nn.ModuleList([first, head.double()]), nn.ModuleList([second])
    optimizers = [torch.optim.SGD(part.parameters(), **document("local")["optimizer"]["params"]) for part in parts]
    losses = [float("nan")]
    for row, following in batches():
        made = first(row)
        for optimizer, scores in zip(optimizers, (head(made), second(made.detach())), strict=True):
            optimizer.zero_grad()
            loss = cross_entropy(scores, following)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    for rank, got in enumerate(found["local"] for found in ranks):
        np.testing.assert_allclose(got["losses"], losses[:-1], rtol=TOLERANCE)
        for (index, name), weight in got["stage"].items():
            exact = dict(modules[index].named_parameters())[name].detach().numpy()
            np.testing.assert_allclose(weight, exact, rtol=TOLERANCE, atol=TOLERANCE)
        expected = {name: weight.detach().numpy() for name, weight in head.named_parameters()} if rank == 0 else {}
        assert got["head"].keys() == expected.keys()
        for name, weight in got["head"].items():
            np.testing.assert_allclose(weight, expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_al_fills_drains_and_keeps_the_replicas_equal(ranks: list[dict[str, dict[str, Any]]]) -> None:
    first, last = (rank["al"] for rank in ranks)
    for rank in (first, last):
        assert all(rank["under_way"])
        assert rank["empty"]
        assert rank["steps"][1] == STEPS
        assert np.isfinite(rank["losses"]).all()
        assert np.isfinite(rank["mismatch"]).all()
    assert first["steps"][0] == STEPS - 1, "the first stage is one batch behind until the drain"
    assert set(first["aux"]) == set(last["aux"])
    for name, weight in first["aux"].items():
        np.testing.assert_array_equal(weight, last["aux"][name])
    start = build_aux_net([SPEC, boundary_specs(layers(), input_spec=SPEC)[1]]).double().state_dict()
    assert all(not np.array_equal(last["aux"][name], start[name].numpy()) for name in start if "qkv.bias" not in name)


def test_train_accuracy_counts_tokens(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for schedule in ("1f1b", "al", "local"):
        last = ranks[1][schedule]
        assert last["tokens"] == STEPS * BATCH * 6
        assert 0 <= last["hits"] <= last["tokens"]
