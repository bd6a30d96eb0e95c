"""Predicts what a step takes: one process, data parallelism, exact pipelines, and dsaux, from measured times.

`dsaux.plan` is the command, `dsaux.plan_measure` measures a `Workload`, the benchmarks compare predictions with what
they measure. docs/planner.md has the formulas and what they leave out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsaux.partition import LayerTimes, balance
from dsaux.plan_exact import data_parallel, exact_pipeline
from dsaux.plan_links import Link, parse_link, parse_memory
from dsaux.plan_local import al_step, local_step, penalty_step
from dsaux.plan_orders import ORDERS
from dsaux.plan_step import Cut, Setting, Step
from dsaux.plan_workload import BackwardSplit, SegmentCost, Workload

__all__ = [
    "CONTESTANTS",
    "DECOUPLED",
    "EXACT",
    "BackwardSplit",
    "LayerTimes",
    "Link",
    "Prediction",
    "SegmentCost",
    "Workload",
    "best",
    "break_even_aux_share",
    "candidates",
    "parse_link",
    "parse_memory",
    "predict",
]

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_SMALLEST_MICRO_BATCH = 2
"""BatchNorm has no statistics of one sample."""
_EQUALLY_FAST = 0.999
"""Part of the best throughput that no measurement tells from it."""

_STEPS: Mapping[str, Callable[[Setting], Step]] = {
    "one-process": data_parallel,
    "ddp": data_parallel,
    **dict.fromkeys(ORDERS, exact_pipeline),
    "dsaux-penalty": penalty_step,
    "dsaux-al": al_step,
    "dsaux-local": local_step,
}
CONTESTANTS = tuple(_STEPS)
DECOUPLED = ("dsaux-penalty", "dsaux-al", "dsaux-local")
EXACT = tuple(name for name in CONTESTANTS if name not in DECOUPLED)
"""Those that compute the gradient of the whole network's loss."""


@dataclass(frozen=True)
class Prediction:
    """What a contestant takes for a step of the global batch.

    Attributes:
        contestant: its name.
        stages: stages K.
        replicas: replicas R.
        micro_batches: micro-batches M.
        global_batch: samples in a step.
        step_s: seconds of a step; of a wavefront in its steady state.
        samples_per_s: samples per second.
        idle_share: part of all ranks' time in which they compute nothing.
        bytes_per_step: what all ranks send together.
        memory_bytes: tensors of the rank that has most of them.
        bounds: where the network is cut: K+1 layer indices, 2K+1 for the schedules with two pieces a rank.
        aux_share: time of the AuxNet (or of the local heads) over that of the layers, where it is largest.
        longest_stage_s: seconds of the layers in a step, on the rank with most of them; without the AuxNet.
    """

    contestant: str
    stages: int
    replicas: int
    micro_batches: int
    global_batch: int
    step_s: float
    samples_per_s: float
    idle_share: float
    bytes_per_step: int
    memory_bytes: int
    bounds: tuple[int, ...]
    aux_share: float
    longest_stage_s: float

    @property
    def is_exact(self) -> bool:
        """Whether it computes the true gradient."""
        return self.contestant in EXACT


def predict(
    workload: Workload,
    contestant: str,
    *,
    stages: int,
    replicas: int,
    micro_batches: int,
    global_batch: int,
    link: Link,
    bounds: Sequence[int] | None = None,
    cores: int | None = None,
) -> Prediction:
    """Predict a step.

    Args:
        workload: times and sizes of the network.
        contestant: one of `CONTESTANTS`.
        stages: stages K; 1 for "one-process" and "ddp".
        replicas: replicas R; 1 for "one-process".
        micro_batches: micro-batches M in a step of a replica.
        global_batch: samples in a step; R x M must divide it.
        link: what joins each pair of neighbouring ranks, in each direction.
        bounds: where to cut; None balances the measured times for this contestant.
        cores: fewer devices than ranks, rank r on number r mod `cores`; the workload's times are those beside all ranks
            at work. A rank of an exact pipeline goes faster while others wait. None: a device each.

    Raises:
        ValueError: if the contestant cannot run like this, or the network cannot be cut so.
    """
    _check(
        contestant,
        stages=stages,
        replicas=replicas,
        micro_batches=micro_batches,
        global_batch=global_batch,
        cores=cores,
    )
    setting = Setting(
        workload=workload,
        contestant=contestant,
        stages=stages,
        replicas=replicas,
        micro_batches=micro_batches,
        micro_batch_size=global_batch // (replicas * micro_batches),
        link=link,
        cut=Cut((0, workload.num_layers)),
        cores=cores,
    )
    cut = Cut(tuple(bounds) if bounds is not None else balanced_bounds(setting))
    if not cut.fits(workload.num_layers, pieces=stages * ORDERS.get(contestant, 1)):
        raise ValueError(
            f"bounds {list(cut.bounds)} do not cut {workload.num_layers} layers into "
            f"{stages * ORDERS.get(contestant, 1)} pieces for {contestant}."
        )
    step = _STEPS[contestant](replace(setting, cut=cut))
    ranks = stages * replicas
    return Prediction(
        contestant=contestant,
        stages=stages,
        replicas=replicas,
        micro_batches=micro_batches,
        global_batch=global_batch,
        step_s=step.seconds,
        samples_per_s=global_batch / step.seconds if step.seconds > 0 else math.inf,
        idle_share=max(0.0, 1.0 - sum(step.busy_s) * replicas / (ranks * step.seconds)) if step.seconds > 0 else 0.0,
        bytes_per_step=round(step.sent_bytes),
        memory_bytes=round(max(step.memory_bytes)),
        bounds=cut.bounds,
        aux_share=step.aux_share,
        longest_stage_s=step.longest_stage_s,
    )


def balanced_bounds(setting: Setting) -> tuple[int, ...]:
    """The cut with the smallest largest cost of a piece, the AuxNet's prefix counted for dsaux.

    Raises:
        ValueError: if there are more pieces than layers, or no boundaries that the AuxNet can make.
    """
    workload, size = setting.workload, setting.micro_batch_size
    pieces = setting.stages * ORDERS.get(setting.contestant, 1)
    if pieces > workload.num_layers:
        raise ValueError(f"{pieces} pieces need as many layers; the network has {workload.num_layers}.")
    costs = [time.total_s for time in workload.layer_times(size)]
    if setting.contestant not in ("dsaux-penalty", "dsaux-al") or setting.stages == 1:
        return balance(costs, num_stages=pieces)[0]
    kinds = [workload.kind(cut) for cut in range(1, workload.num_layers + 1)]
    first_of = {kind: kinds.index(kind) + 1 for kind in kinds}

    def segment_s(source: int | None, target: int) -> float:
        cost = workload.segment(None if source is None else first_of[source], first_of[target], size)
        return cost.forward_s + cost.backward_s

    return balance(costs, num_stages=pieces, specs_after=kinds, segments=segment_s)[0]


def candidates(
    workload: Workload,
    *,
    devices: int,
    global_batch: int,
    link: Link,
    contestants: Sequence[str] = CONTESTANTS,
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> Iterator[Prediction]:
    """Every way in which the contestants can use the devices; "one-process" uses one of them.

    Args:
        workload: times and sizes.
        devices: how many; stages x replicas of the others.
        global_batch: samples in a step.
        link: between devices.
        contestants: which ones.
        micro_batches: counts to try; those that leave whole micro-batches of two samples or more are taken.
    """
    for name, stages, count in itertools.product(contestants, range(1, devices + 1), micro_batches):
        replicas = 1 if name == "one-process" else devices // stages
        if devices % stages or (stages == 1) != (name in ("one-process", "ddp")):
            continue
        size, rest = divmod(global_batch, replicas * count)
        if rest or size < _SMALLEST_MICRO_BATCH:
            continue
        try:
            yield predict(
                workload,
                name,
                stages=stages,
                replicas=replicas,
                micro_batches=count,
                global_batch=global_batch,
                link=link,
            )
        except ValueError:  # this contestant cannot run so: too few layers or micro-batches for it
            continue


def best(predictions: Sequence[Prediction], *, memory_bytes: float = math.inf) -> Prediction | None:
    """The fastest of those that fit into a device's memory, of equally fast ones the smallest; None if none fits."""
    fitting = [prediction for prediction in predictions if prediction.memory_bytes <= memory_bytes]
    if not fitting:
        return None
    enough = _EQUALLY_FAST * max(prediction.samples_per_s for prediction in fitting)
    fast = [prediction for prediction in fitting if prediction.samples_per_s >= enough]
    return min(fast, key=lambda prediction: (prediction.memory_bytes, -prediction.samples_per_s))


def break_even_aux_share(
    workload: Workload,
    *,
    devices: int,
    global_batch: int,
    link: Link,
    against: Sequence[str] = EXACT,
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> float:
    """The AuxNet's share of a stage's time below which dsaux-al is faster than the best exact contestant.

    Both are taken at their best cut and number of micro-batches: (t_exact - t_al(AuxNet of no cost)) / t_stage, where
    t_al is dsaux-al's step with everything but the AuxNet's work and t_stage its longest stage. Negative where even an
    AuxNet of no cost would lose. With equal stages and a free link against 1F1B it is (K-1)/M.

    Args:
        workload: times and sizes.
        devices: how many.
        global_batch: samples in a step.
        link: between devices.
        against: exact contestants to compare with.
        micro_batches: counts to try.

    Raises:
        ValueError: if dsaux-al, or none of the others, can run on these devices.
    """
    # layers are asked of the workload given, which remembers what it has measured
    free = replace(workload, segment_cost=None, measure_size=workload.layer_times)
    shape = {"devices": devices, "global_batch": global_batch, "link": link, "micro_batches": micro_batches}
    ours = min(candidates(free, contestants=["dsaux-al"], **shape), key=_step_s, default=None)  # type: ignore[arg-type]
    theirs = min(candidates(workload, contestants=list(against), **shape), key=_step_s, default=None)  # type: ignore[arg-type]
    if ours is None or theirs is None:
        raise ValueError(f"there is nothing to compare on {devices} devices with a batch of {global_batch}.")
    return (theirs.step_s - ours.step_s) / ours.longest_stage_s


def _step_s(prediction: Prediction) -> float:
    return prediction.step_s


def _check(
    contestant: str, *, stages: int, replicas: int, micro_batches: int, global_batch: int, cores: int | None
) -> None:
    if contestant not in _STEPS:
        raise ValueError(f'there is no contestant "{contestant}"; there are {", ".join(CONTESTANTS)}.')
    if min(stages, replicas, micro_batches, global_batch) < 1:
        raise ValueError("stages, replicas, micro-batches and the global batch must be 1 or more.")
    if cores is not None and cores < 1:
        raise ValueError(f"ranks cannot share {cores} cores; give 1 or more, or None for a device each.")
    if global_batch % (replicas * micro_batches):
        raise ValueError(
            f"a batch of {global_batch} cannot be shared by {replicas} replicas with {micro_batches} micro-batches."
        )
    if contestant in ("one-process", "ddp") and stages > 1:
        raise ValueError(f"{contestant} has one stage, not {stages}.")
    if contestant == "one-process" and replicas > 1:
        raise ValueError(f"one-process has one replica, not {replicas}.")
