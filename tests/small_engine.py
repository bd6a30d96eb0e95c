"""The small network on the real engine: what the ranks of a multi-process test run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsaux.assemble import cross_entropy
from dsaux.bootstrap import initialize
from dsaux.engine import AuxPipelineEngine
from dsaux.models import Layer
from dsaux.module import AuxPipelineModule
from tests.ranks import run_ranks
from tests.small_net import batches, small_aux_net, small_config, small_heads, small_layers

GLOBAL_BATCH = 16


@dataclass(frozen=True)
class Case:
    """One way to run the small network.

    Attributes:
        bounds: K+1 layer indices.
        schedule: penalty, al, local or 1f1b.
        replicas: data-parallel replicas.
        accumulation: micro-batches in a step.
        steps: optimizer steps.
        drain_after: steps after which the engine finishes the batches under way; it always does at the end.
        dtype: precision of the weights.
        changes: further changes of the configuration.
        module_options: further arguments of the module.
        frozen: layers whose weights stay what they are.
    """

    bounds: tuple[int, ...]
    schedule: str = "penalty"
    replicas: int = 1
    accumulation: int = 1
    steps: int = 5
    drain_after: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    changes: dict[str, Any] = field(default_factory=dict)
    module_options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.bounds) - 1

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.num_stages * self.replicas

    def document(self) -> dict[str, Any]:
        """The configuration."""
        return small_config(
            stages=self.num_stages,
            batch=GLOBAL_BATCH,
            accumulation=self.accumulation,
            **{**self.changes, "dsaux": {**self.changes.get("dsaux", {}), "pipeline": {"schedule": self.schedule}}},
        )

    def replica_batches(self, replica: int, *, seed: int = 7) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of one replica over all steps: slices of the same global batches for every case."""
        size = GLOBAL_BATCH // (self.replicas * self.accumulation)
        found = []
        for inputs, labels in batches(self.steps, GLOBAL_BATCH, seed=seed):
            for micro in range(self.accumulation):
                start = (replica * self.accumulation + micro) * size
                found.append((inputs[start : start + size].to(self.dtype), labels[start : start + size]))
        return found


def build(case: Case) -> AuxPipelineEngine:
    """This rank's engine for a case."""
    has_aux = case.schedule not in ("local", "1f1b") and case.num_stages > 1
    layers = [freeze(layer) if index in case.frozen else layer for index, layer in enumerate(small_layers())]
    module = AuxPipelineModule(
        layers,
        num_stages=case.num_stages,
        bounds=case.bounds,
        loss_fn=cross_entropy,
        aux_net=small_aux_net(list(case.bounds)) if has_aux else None,
        local_heads=small_heads(list(case.bounds)) if case.schedule == "local" else None,
        **case.module_options,
    ).to(case.dtype)
    engine, _, _, _ = initialize(model=module, config=case.document())
    return engine


def freeze(layer: Layer) -> Layer:
    """The layer with weights that no optimizer may change."""
    return replace(layer, make=lambda: layer.make().requires_grad_(False))


def train(case: Case, *, each_step: Callable[[AuxPipelineEngine, int], None] | None = None) -> dict[str, Any]:
    """Build the engine, train, and return losses, mismatches and the weights of stage and AuxNet."""
    engine = build(case)
    data = iter(case.replica_batches(engine.grid.get_data_parallel_rank()))
    losses, mismatches = [], []
    for step in range(case.steps):
        losses.append(float(engine.train_batch(data)))
        mismatches.append(engine.boundary_mismatch.tolist())
        if each_step is not None:
            each_step(engine, step)
        if step + 1 in case.drain_after:
            engine.drain()
    engine.drain()
    return {"losses": losses, "mismatches": mismatches, **weights(engine)}


def train_each(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """:func:`train` for several cases in the same processes: starting ranks costs more than a case."""
    return {name: train(case) for name, case in cases.items()}


def trained(cases: dict[str, Case], world_size: int) -> dict[str, list[dict[str, Any]]]:
    """Results by case, in rank order, of those among `cases` that take `world_size` ranks."""
    fitting = {name: case for name, case in cases.items() if case.world_size == world_size}
    ranks = run_ranks(train_each, world_size, fitting)
    return {name: [rank[name] for rank in ranks] for name in fitting}


def weights(engine: AuxPipelineEngine) -> dict[str, Any]:
    """Weights of this rank as numpy arrays: the stage's by (layer index, name), AuxNet's and local head's by name."""
    first = engine.module._local_start
    stage = {}
    for name, parameter in engine.module.named_parameters():
        if name.startswith("local_head."):
            continue
        index, inner = name.split(".", 1)
        stage[int(index), inner] = parameter.detach().to(torch.float64).cpu().numpy()
    assert all(index >= first for index, _ in stage)
    aux = {} if engine.aux.net is None else engine.aux.net.state_dict()
    head = {} if engine.module.local_head is None else engine.module.local_head.state_dict()
    parts = {"aux": aux, "head": head}
    return {"stage": stage} | {
        part: {name: tensor.detach().to(torch.float64).cpu().numpy() for name, tensor in its.items()}
        for part, its in parts.items()
    }
