"""What the planner is told of this machine while a case is measured: how fast its cores are just then, and the engines.

Two gauges, neither of which sees a contestant train:

- "lock-step": the ranks divide the micro-batches of a step, or each takes one where there are fewer, and pass the whole
  network forward and backward with them, then all meet at a barrier. It takes turns with the contestants. A core of a
  shared machine is slower for seconds at a time, and ranks that wait for each other go at the pace of the slowest.
- "hollow" layers compute nothing, but hand on tensors of the network's sizes: a pipeline of them shows what the engine
  itself does for each micro-batch, messages included. Layers that sleep are hollow when they do not sleep; the AuxNet,
  which theory takes as free there, is part of the engine then. Where ranks share a core a hollow layer uses up the
  processor time that the real one takes: who waits for a message there is woken up beside somebody who computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import EXACT, Case, Entry
from contestants import CONTESTANTS, LOCK_STEP
from sleepers import Sleeper, SleepingLayer
from torch import Tensor, nn
from work import Work

from dsaux.models import Layer, boundary_specs
from dsaux.models.shapes import SampleSpec
from dsaux.partition import LayerTimes
from dsaux.planner import Link, SegmentCost, Workload, predict

HOLLOW_WARMUP, HOLLOW_STEPS = 3, 10
SPIN_WARMUP, SPIN_STEPS = 1, 5
"""Steps of hollow layers that use up time, and last as long as real ones."""
_HALVINGS = 40


@dataclass(frozen=True)
class Pace:
    """What a lock-step gauge measures: the whole network on so many ranks, each so often with its share of the batch.

    Attributes:
        ranks: processes.
        threads: of each.
        micro_batches: into which the ranks together divide the global batch.
    """

    ranks: int
    threads: int
    micro_batches: int

    @property
    def passes(self) -> int:
        """Forward and backward passes of a rank between two barriers; one where ranks outnumber micro-batches."""
        return max(1, self.micro_batches // self.ranks)


def pace_of(entry: Entry, micro_batches: int) -> Pace:
    """The gauge with an entry's processes and size of micro-batch.

    A rank of a pipeline has a part of the network and all M micro-batches; one of the gauge the network and M / ranks.
    """
    replicas = 1 if CONTESTANTS[entry.contestant].chunks else entry.ranks
    return Pace(entry.ranks, entry.threads, replicas * micro_batches)


def lock_step_entries(case: Case) -> list[Entry]:
    """The lock-step gauges of a case, as entries; none for layers that sleep, whose times are set."""
    if case.make_work().sleeper is not None:
        return []
    paces = dict.fromkeys(pace_of(entry, count) for entry in case.entries for count in entry.micro_batches)
    teams = dict.fromkeys((pace.ranks, pace.threads) for pace in paces)
    return [
        Entry(
            LOCK_STEP,
            ranks,
            tuple(pace.micro_batches for pace in paces if (pace.ranks, pace.threads) == (ranks, threads)),
            threads,
        )
        for ranks, threads in teams
    ]


def hollow_entries(case: Case) -> list[Entry]:
    """The entries whose engines are measured with hollow layers.

    With real layers an AuxNet is real as well, and its time would hide the engine's.
    """
    sleeps = case.make_work().sleeper is not None
    return [entry for entry in case.entries if sleeps or entry.contestant in EXACT]


# ---- hollow layers --------------------------------------------------------------------------------------------------


class _Hollow(torch.autograd.Function):
    """Tensors of the right sizes, with whatever was in that memory; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return x.new_empty((len(x), *shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        return (
            gradient.new_empty(ctx.shape) if wants_x else None,
            gradient.new_zeros(1) if wants_weight else None,
            None,
        )


class HollowLayer(nn.Module):
    """Hands on a tensor of the right size and has one parameter, so that there is something to optimise.

    Args:
        spec: one sample of its output.
    """

    def __init__(self, spec: SampleSpec) -> None:
        super().__init__()
        self.shape = spec.shape
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, *shape of the spec)."""
        out: Tensor = _Hollow.apply(x, self.weight, self.shape)
        return out

    def extra_repr(self) -> str:
        """Its output's shape: what tells it from others."""
        return str(self.shape)


def hollow_work(make_work: Callable[[], Work], *, spin: Sequence[LayerTimes] | None = None) -> Work:
    """A work with a hollow layer for each of its own; one of sleeping layers with layers that stay awake.

    Args:
        make_work: makes the work.
        spin: seconds of processor time for a sample that each layer is to use up; None: none.
    """
    work = make_work()
    if work.sleeper is not None:
        work.sleeper.means_s.update(dict.fromkeys(work.sleeper.means_s, 0.0))
        return work
    after = boundary_specs(list(work.layers), input_spec=work.input_spec)
    times = spin or (None,) * len(after)
    layers = (
        Layer(layer.name, _HollowMaker(spec, its)) for layer, spec, its in zip(work.layers, after, times, strict=True)
    )
    return replace(work, layers=tuple(layers))


class Spinner(Sleeper):
    """Uses up the processor time for which its layer would else sleep."""

    def sleep(self, kind: str, *, samples: float) -> None:
        """Spin until this thread has had the time of a "forward" or "backward" pass over so many samples."""
        until = time.thread_time() + samples * self.means_s[kind]
        while time.thread_time() < until:
            pass


class SpinningLayer(SleepingLayer):
    """Hands on what a hollow layer makes, and uses up processor time before.

    Args:
        body: the hollow layer.
        times: seconds for a sample.
    """

    def __init__(self, body: nn.Module, times: LayerTimes) -> None:
        super().__init__(body, Spinner(forward_s=times.forward_s, backward_s=times.backward_s))
        self.times = times

    def extra_repr(self) -> str:
        """Its times: what tells it from others."""
        return str(self.times)


@dataclass(frozen=True)
class _HollowMaker:
    spec: SampleSpec
    times: LayerTimes | None

    def __call__(self) -> nn.Module:
        layer = HollowLayer(self.spec)
        return layer if self.times is None else SpinningLayer(layer, self.times)


# ---- what follows for the planner -----------------------------------------------------------------------------------


def at_pace(workload: Workload, pace: float, *, overhead_s: float = 0.0) -> Workload:
    """A workload whose passes all take `pace` times as long, on an engine that takes so long for each micro-batch.

    Args:
        workload: what was measured; it is asked for what has not been measured yet.
        pace: factor of all forward and backward passes.
        overhead_s: seconds per micro-batch and rank.
    """

    def layers(size: int) -> tuple[LayerTimes, ...]:
        return tuple(LayerTimes(pace * t.forward_s, pace * t.backward_s) for t in workload.layer_times(size))

    def scaled(cost: SegmentCost) -> SegmentCost:
        return replace(cost, forward_s=pace * cost.forward_s, backward_s=pace * cost.backward_s)

    return replace(
        workload,
        times={},
        measure_size=layers,
        segment_cost=lambda source, target, size: scaled(workload.segment(source, target, size)),
        head_cost=lambda cut, size: scaled(workload.head(cut, size)),
        splits={},
        measure_split=workload.split,
        overhead_s=overhead_s,
    )


def engine_overhead_s(
    hollow: Workload,
    contestant: str,
    *,
    stages: int,
    micro_batches: int,
    global_batch: int,
    link: Link,
    bounds: Sequence[int],
    step_s: float,
    cores: int | None = None,
) -> float:
    """Seconds per micro-batch and rank with which the planner's model of an engine gives a step that was measured.

    Args:
        hollow: times of the hollow layers.
        contestant: whose engine.
        stages: stages K.
        micro_batches: micro-batches in a step.
        global_batch: samples in a step.
        link: between the ranks.
        bounds: where the layers were cut.
        step_s: what a step with hollow layers took.
        cores: that the ranks shared, for `predict`; None: a core each.
    """

    def predicted_s(overhead_s: float) -> float:
        shape = {"stages": stages, "replicas": 1, "micro_batches": micro_batches, "global_batch": global_batch}
        work = at_pace(hollow, 1.0, overhead_s=overhead_s)
        return predict(work, contestant, link=link, bounds=bounds, cores=cores, **shape).step_s  # type: ignore[arg-type]

    low, high = 0.0, step_s
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if predicted_s(middle) < step_s else (low, middle)
    return low
