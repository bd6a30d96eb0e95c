"""`train.py --dry_run`: builds everything that a run would build, measures it, and trains nothing.

One process stands for all stages, so that a configuration for a cluster is checked on a laptop; no data is read where
a data set's figures are known. What it prints is a prediction: layers are timed on this device, transfers, loader and
optimizer are not.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from dsaux.assemble import build_aux_net_of, build_local_heads_of
from dsaux.command import console, show_summary
from dsaux.config import Config, Launch, has_aux_net
from dsaux.data import DataFacts, dataset_facts
from dsaux.display_text import Column, count, memory, plain_table, throughput
from dsaux.memory import StageMemory, stage_memory
from dsaux.models import Layer, boundary_specs, build_layer
from dsaux.models.auxnet import AuxNet
from dsaux.models.causality import run_layers
from dsaux.models.cost import Cost, chain_cost
from dsaux.models.shapes import SampleSpec
from dsaux.partition import NetworkTimes, choose_bounds, time_network

_LARGEST_FORWARD = 2e9
"""Multiply-accumulates of the whole network in a timed micro-batch: a CPU does them in well under a second."""
_SMALLEST_BATCH = 2


@dataclass(frozen=True)
class StagePlan:
    """What one rank of a stage would hold and do.

    Attributes:
        names: its layers.
        layers: their cost.
        aux_net: cost of the AuxNet's segments that it evaluates, with the parameters of all; None without an AuxNet.
        seconds: forward and backward pass of a micro-batch on this device, AuxNet included.
        memory: estimate for its tensors.
    """

    names: tuple[str, ...]
    layers: Cost
    aux_net: Cost | None
    seconds: float
    memory: StageMemory


@dataclass(frozen=True)
class DryRun:
    """What a configuration would make.

    Attributes:
        config: the configuration.
        launch: processes and batch sizes.
        facts: of the data set.
        bounds: K+1 layer indices.
        stages: one plan each.
        network: cost of the whole network.
        aux_net: cost of the whole AuxNet; None without one.
        timed_batch: samples in the micro-batch that was timed; its times were scaled to the run's.
        device: where.
    """

    config: Config
    launch: Launch
    facts: DataFacts
    bounds: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    network: Cost
    aux_net: Cost | None
    timed_batch: int
    device: torch.device

    @property
    def ticks(self) -> int:
        """Micro-batch times of the slowest stage in a step."""
        micro_batches = self.launch.gradient_accumulation_steps
        return micro_batches + (self.launch.stages - 1 if self.config.dsaux.pipeline.schedule == "1f1b" else 0)

    @property
    def step_s(self) -> float:
        """Predicted seconds of an optimizer step, compute alone."""
        return self.ticks * max(stage.seconds for stage in self.stages)

    @property
    def aux_share(self) -> float | None:
        """Multiply-accumulates of the AuxNet over those of the network; None without one."""
        if self.aux_net is None:
            return None
        return self.aux_net.multiply_accumulates / self.network.multiply_accumulates


def plan(config: Config, launch: Launch, *, device: torch.device) -> DryRun:
    """Build and measure everything.

    Args:
        config: the checked configuration.
        launch: processes, stages, replicas and batch sizes.
        device: where to time.

    Raises:
        ConfigError: if the data set or the network cannot be had.
        ValueError: if the network cannot be cut as asked.
    """
    settings = config.dsaux
    facts = dataset_facts(settings.data)
    layers = run_layers(settings, num_classes=facts.num_classes, input_spec=facts.input_spec)
    network = chain_cost([layer.make for layer in layers], input_spec=facts.input_spec)
    timed_batch = int(_LARGEST_FORWARD // max(1, network.multiply_accumulates))
    timed_batch = min(launch.micro_batch_size, max(_SMALLEST_BATCH, timed_batch))
    times = time_network(
        layers,
        input_spec=facts.input_spec,
        aux_depth=settings.aux.depth,
        aux_width=settings.aux.width,
        aux_segment=settings.aux.segment,
        micro_batch_size=timed_batch,
        device=device,
        with_aux=has_aux_net(settings),
        with_heads=settings.pipeline.schedule == "local",
        seed=settings.run.seed,
    )
    bounds = _bounds(config, launch, layers=layers, facts=facts, times=times, device=device)
    _build(layers, seed=settings.run.seed)
    aux_net = build_aux_net_of(config, layers, input_spec=facts.input_spec, bounds=bounds)
    seconds = [cost * launch.micro_batch_size / timed_batch for cost in times.stage_costs(bounds)]
    stages = _stage_plans(config, launch, layers=layers, facts=facts, bounds=bounds, aux_net=aux_net, seconds=seconds)
    whole = None if aux_net is None else _segments_cost(aux_net, facts.input_spec, depth=aux_net.num_boundaries)
    return DryRun(config, launch, facts, tuple(bounds), stages, network, whole, timed_batch, device)


def show(dry: DryRun, out: Console | None = None) -> None:
    """Print the stages, the AuxNet, and what a step would take."""
    out = out or console()
    settings, launch = dry.config.dsaux, dry.launch
    header = f"{settings.model.name}, {settings.pipeline.schedule}, {count(launch.stages, 'stage')} x "
    out.print(
        Text(f"{settings.run.name}: {header}{count(launch.replicas, 'replica')} (dry run)", style="bold"),
        soft_wrap=True,
    )
    for line in plain_table(_COLUMNS, _rows(dry)):
        out.print(Text(f"  {line}"), soft_wrap=True)
    show_summary(out, "nothing was trained; compute alone, without transfers, loader and optimizer", _summary(dry))


# ---- parts ----------------------------------------------------------------------------------------------------------


def _bounds(
    config: Config,
    launch: Launch,
    *,
    layers: list[Layer],
    facts: DataFacts,
    times: NetworkTimes,
    device: torch.device,
) -> Sequence[int]:
    method = config.dsaux.pipeline.partition
    if method == "time" and launch.stages > 1:
        return times.balanced(launch.stages).bounds
    return choose_bounds(
        method,
        layers=layers,
        num_stages=launch.stages,
        input_spec=facts.input_spec,
        aux_depth=config.dsaux.aux.depth,
        aux_width=config.dsaux.aux.width,
        aux_segment=config.dsaux.aux.segment,
        micro_batch_size=launch.micro_batch_size,
        device=device,
        with_aux=has_aux_net(config.dsaux),
        with_heads=config.dsaux.pipeline.schedule == "local",
        seed=config.dsaux.run.seed,
    ).bounds


def _build(layers: list[Layer], *, seed: int) -> None:
    """Make every layer with its real weights, one after the other, as the ranks would."""
    for index, layer in enumerate(layers):
        build_layer(layer, index, seed=seed)


def _stage_plans(
    config: Config,
    launch: Launch,
    *,
    layers: list[Layer],
    facts: DataFacts,
    bounds: Sequence[int],
    aux_net: AuxNet | None,
    seconds: Sequence[float],
) -> tuple[StagePlan, ...]:
    after = [facts.input_spec, *boundary_specs(layers, input_spec=facts.input_spec)]
    heads = build_local_heads_of(config, layers, input_spec=facts.input_spec, bounds=bounds) or []
    plans = []
    for stage, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = layers[first:last]
        makers: list[Callable[[], nn.Module]] = [layer.make for layer in own]
        # A local head belongs to its stage: it is trained, kept and paid for there.
        makers += [functools.partial(copy.deepcopy, head) for head in heads[stage : stage + 1]]
        cost = chain_cost(makers, input_spec=after[first])
        aux = None
        if aux_net is not None:
            depth = min(stage + 1, aux_net.num_boundaries)
            aux = _segments_cost(aux_net, facts.input_spec, depth=depth)
            aux = replace(aux, parameters=sum(parameter.numel() for parameter in aux_net.parameters()))
        crossing = (
            math.prod(after[first].shape) if stage > 0 else 0,
            math.prod(after[last].shape) if stage < launch.stages - 1 else 0,
        )
        estimate = stage_memory(config, launch, stage=stage, layers=cost, aux_net=aux, boundary_numbers=crossing)
        plans.append(StagePlan(tuple(layer.name for layer in own), cost, aux, seconds[stage], estimate))
    return tuple(plans)


def _segments_cost(aux_net: AuxNet, spec: SampleSpec, *, depth: int) -> Cost:
    segments = list(aux_net.segments)[:depth]
    return chain_cost([functools.partial(copy.deepcopy, segment) for segment in segments], input_spec=spec)


_COLUMNS = (
    Column("stage"),
    Column("layers", is_text=True),
    Column("parameters"),
    Column("MMAC/sample"),
    Column("AuxNet"),
    Column("ms/micro-batch"),
    Column("% of time"),
    Column("memory"),
)


def _rows(dry: DryRun) -> list[list[str]]:
    total = sum(stage.seconds for stage in dry.stages)
    rows = []
    for number, stage in enumerate(dry.stages):
        aux = "-" if stage.aux_net is None else f"{stage.aux_net.multiply_accumulates / 1e6:.2f}"
        layers = stage.names[0] if len(stage.names) == 1 else f"{stage.names[0]} .. {stage.names[-1]}"
        rows.append(
            [
                str(number),
                layers,
                f"{stage.layers.parameters:,}",
                f"{stage.layers.multiply_accumulates / 1e6:.2f}",
                aux,
                f"{1e3 * stage.seconds:.1f}",
                f"{100 * stage.seconds / total:.1f}",
                memory(stage.memory.total),
            ]
        )
    return rows


def _summary(dry: DryRun) -> list[tuple[str, Text | str]]:
    launch, run, facts = dry.launch, dry.config.dsaux.run, dry.facts
    steps = facts.num_train // launch.train_batch_size
    total = steps * run.epochs if run.max_steps is None else min(run.max_steps, steps * run.epochs)
    micro_batches = launch.gradient_accumulation_steps
    batch = (
        f"{launch.train_batch_size:,} = {count(launch.replicas, 'replica')} x "
        f"{micro_batches:,} micro-batch{'es' * (micro_batches != 1)} x {launch.micro_batch_size}"
    )
    aux = "none"
    if dry.aux_net is not None and dry.aux_share is not None:
        aux = (
            f"{dry.aux_net.parameters:,} parameters ({100 * dry.aux_net.parameters / dry.network.parameters:.1f} % of "
            f"the network's), {dry.aux_net.multiply_accumulates / 1e6:.2f} MMAC/sample ({100 * dry.aux_share:.1f} %)"
        )
    shape = " x ".join(str(size) for size in facts.input_spec.shape)
    timed = "" if dry.timed_batch == launch.micro_batch_size else f", timed with {dry.timed_batch} samples and scaled"
    rate = launch.train_batch_size / dry.step_s
    return [
        (
            "data",
            f"{dry.config.dsaux.data.name}: {shape}, {facts.num_classes:,} classes, {facts.num_train:,} + "
            f"{facts.num_test:,} samples",
        ),
        (
            "network",
            f"{dry.network.parameters:,} parameters, {dry.network.multiply_accumulates / 1e6:,.1f} MMAC/sample",
        ),
        ("AuxNet", aux),
        ("global batch", batch),
        ("run", f"{count(run.epochs, 'epoch')}, {count(total, 'step')}"),
        ("step", f"{1e3 * dry.step_s:,.1f} ms, {throughput(rate)} samples/s on {dry.device}{timed}"),
        ("memory", f"at most {memory(max(stage.memory.total for stage in dry.stages))} of tensors in a process"),
    ]
