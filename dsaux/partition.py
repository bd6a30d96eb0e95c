"""Where the network is cut: layer costs to stage bounds, the AuxNet's share counted.

Called once at the start, on rank 0 (`dsaux.assemble.agree_on_partition`). A stage's cost is that of its layers and of
the AuxNet's segments that its rank evaluates: with K stages, stage k needs lambda_k and its target lambda_(k+1), so
segments T_1 .. T_min(k+1, K-1). Late stages thus carry more of the AuxNet, and a balanced cut gives early stages more
layers. Under greedy local losses a stage has its own head in place of the AuxNet.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from dsaux.config_rules import ConfigError
from dsaux.launch_check import partition_indices
from dsaux.models import Layer, boundary_specs, build_layer
from dsaux.models.auxnet import make_segment
from dsaux.models.local_heads import make_local_head
from dsaux.models.shapes import SampleSpec, Shape, as_spec

WARMUP_RUNS, TIMED_RUNS = 1, 5
_Kind = TypeVar("_Kind", bound=Hashable)


@dataclass(frozen=True)
class Partition:
    """Stage bounds and what they were chosen by.

    Attributes:
        bounds: K+1 layer indices; stage k holds layers bounds[k] .. bounds[k+1]-1.
        stage_costs: cost of each stage in `unit`, the AuxNet's share included where times were measured.
        unit: "layers", "parameters" or "s" (seconds per micro-batch, forward and backward).
        method: "uniform", "parameters", "time" or "bounds" (given in the configuration).
    """

    bounds: tuple[int, ...]
    stage_costs: tuple[float, ...]
    unit: str
    method: str


def choose_bounds(
    method: str | Sequence[int | str],
    *,
    layers: list[Layer],
    num_stages: int,
    input_spec: SampleSpec | Shape,
    aux_depth: int,
    aux_width: float,
    aux_segment: str,
    micro_batch_size: int,
    device: torch.device,
    with_aux: bool,
    with_heads: bool = False,
    seed: int,
) -> Partition:
    """Cut a network into stages.

    Args:
        method: "uniform" (equal numbers of layers), "parameters", "time" (measured here and now), or the layer that
            starts each stage after the first, by index or name.
        layers: the network.
        num_stages: number of stages K.
        input_spec: one sample of the data, or its shape.
        aux_depth: residual blocks in an AuxNet segment.
        aux_width: width factor of the segments.
        aux_segment: kind of segment.
        micro_batch_size: samples in a micro-batch, for the timing.
        device: where to time.
        with_aux: whether stages evaluate the AuxNet; False for the schedules 1f1b and local.
        with_heads: whether stages have local heads, as under the schedule local.
        seed: the run's seed.

    Returns:
        The partition with the smallest largest stage cost.

    Raises:
        ConfigError: if given bounds do not fit the network.
        ValueError: if no cut is possible, for more stages than layers or shapes that the AuxNet cannot make.
    """
    if num_stages > len(layers):
        raise ValueError(f"{num_stages} stages need at least {num_stages} layers; the network has {len(layers)}.")
    if not isinstance(method, str):
        inner = partition_indices(method, names=[layer.name for layer in layers], stages=num_stages)
        bounds = (0, *inner, len(layers))
        counts = tuple(float(b - a) for a, b in itertools.pairwise(bounds))
        return Partition(bounds, counts, unit="layers", method="bounds")
    if method == "uniform":
        return _balanced(method, [1.0] * len(layers), num_stages=num_stages, unit="layers")
    if method == "parameters":
        costs = [float(_num_parameters(layer)) for layer in layers]
        return _balanced(method, costs, num_stages=num_stages, unit="parameters")
    if num_stages == 1:
        # Nothing to decide: measuring would only cost time.
        return _balanced(method, [1.0] * len(layers), num_stages=1, unit="layers")
    times = time_network(
        layers,
        input_spec=input_spec,
        aux_depth=aux_depth,
        aux_width=aux_width,
        aux_segment=aux_segment,
        micro_batch_size=micro_batch_size,
        device=device,
        with_aux=with_aux,
        with_heads=with_heads,
        seed=seed,
    )
    return times.balanced(num_stages)


@dataclass(frozen=True)
class LayerTimes:
    """What a layer takes for one micro-batch of a given size.

    Attributes:
        forward_s: seconds of its forward pass.
        backward_s: seconds of its backward pass, gradients by weights and input.
    """

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        """Both passes."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class NetworkTimes:
    """What a network and its AuxNet take on one device.

    Attributes:
        layers: seconds of each layer per micro-batch, forward and backward.
        specs_after: what one sample is after each layer.
        segments: seconds of the AuxNet's segments, measured when first asked for.
        heads: seconds of the local head at a boundary, likewise; infinite where there is none; None without heads.
    """

    layers: list[float]
    specs_after: list[SampleSpec]
    segments: SegmentTimes
    heads: Callable[[SampleSpec], float] | None = None

    def balanced(self, num_stages: int) -> Partition:
        """The cut whose slowest stage is the fastest.

        Raises:
            ValueError: if no cut is possible.
        """
        bounds, stage_costs = balance(
            self.layers,
            num_stages=num_stages,
            specs_after=self.specs_after,
            segments=self.segments,
            heads=self.heads,
        )
        return Partition(bounds, stage_costs, unit="s", method="time")

    def stage_costs(self, bounds: Sequence[int]) -> tuple[float, ...]:
        """Seconds of each stage per micro-batch, AuxNet's share or local head included.

        Args:
            bounds: K+1 layer indices.
        """
        total = np.concatenate([[0.0], np.cumsum(self.layers)])
        return _stage_costs(bounds, total=total, kinds=self.specs_after, cost_of=self.segments, head_of=self.heads)


def time_network(
    layers: list[Layer],
    *,
    input_spec: SampleSpec | Shape,
    aux_depth: int,
    aux_width: float,
    aux_segment: str,
    micro_batch_size: int,
    device: torch.device,
    with_aux: bool,
    with_heads: bool = False,
    seed: int,
) -> NetworkTimes:
    """Measure every layer here and now; the arguments are those of `choose_bounds`."""
    spec = as_spec(input_spec)
    after = boundary_specs(layers, input_spec=spec)
    times = layer_times(layers, [spec, *after[:-1]], micro_batch_size=micro_batch_size, device=device, seed=seed)

    def segment_time(source: SampleSpec, target: SampleSpec, *, first: bool) -> float:
        segment = make_segment(source, target, kind=aux_segment, depth=aux_depth, width=aux_width, first=first)
        return measure(segment, source, micro_batch_size=micro_batch_size, device=device).total_s

    @functools.cache
    def head_time(boundary: SampleSpec) -> float:
        try:
            head = make_local_head(boundary, scores=after[-1])
        except ValueError:
            return float("inf")
        return measure(head, boundary, micro_batch_size=micro_batch_size, device=device).total_s

    segments = SegmentTimes(segment_time if with_aux else None, input_spec=spec)
    return NetworkTimes([time.total_s for time in times], after, segments, heads=head_time if with_heads else None)


class SegmentTimes:
    """Time of an AuxNet segment between two boundaries, measured when first asked for.

    Args:
        measure: `measure(source, target, first=...) -> seconds`, raising ValueError where no segment fits; None counts
            no time.
        input_spec: one sample of the data, the source of the first segment.
    """

    def __init__(self, measure: Callable[..., float] | None, *, input_spec: SampleSpec) -> None:
        self.input_spec, self._measure = input_spec, measure
        self._known: dict[tuple[SampleSpec | None, SampleSpec], float] = {}

    def __call__(self, source: SampleSpec | None, target: SampleSpec) -> float:
        """Seconds of the segment from `source` (None: the data) to `target`; infinite where none is possible."""
        if self._measure is None:
            return 0.0
        if (source, target) not in self._known:
            try:
                seconds = self._measure(source or self.input_spec, target, first=source is None)
            except ConfigError:  # a user's own segment that fails is no segment that does not exist
                raise
            except ValueError:
                seconds = float("inf")
            self._known[source, target] = seconds
        return self._known[source, target]


def balance(
    costs: Sequence[float],
    *,
    num_stages: int,
    specs_after: Sequence[_Kind] | None = None,
    segments: Callable[[_Kind | None, _Kind], float] | None = None,
    heads: Callable[[_Kind], float] | None = None,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Bounds with the smallest largest stage cost, exactly, by dynamic programming.

    The AuxNet's share of a stage depends on the shapes at all cuts before it, so a state is the path of specs so far;
    a residual network has few of them.

    Args:
        costs: cost of each layer.
        num_stages: number of stages K, at most the number of layers.
        specs_after: what a sample is after each layer, or anything that tells kinds of boundaries apart; needed with
            `segments`.
        segments: `segments(source or None, target) -> cost` of an AuxNet segment.
        heads: `heads(boundary) -> cost` of the local head of the stage before a boundary; likewise.

    Returns:
        Bounds (K+1 indices) and the K stage costs.

    Raises:
        ValueError: if AuxNet or heads can serve the shapes of no K-1 cuts.
    """
    num_layers = len(costs)
    total = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=float))])
    is_known = specs_after is not None and (segments is not None or heads is not None)
    kinds = list(specs_after) if is_known and specs_after is not None else [None] * num_layers
    cost_of = segments if segments is not None and specs_after is not None else (lambda source, target: 0.0)
    work = total[None, :] - total[:, None]  # work[i, j]: layers i .. j-1
    work[np.tril_indices(num_layers + 1)] = np.inf

    # A state, that is a path of specs, holds the AuxNet's cost so far, for each cut j the smallest largest cost of the
    # stages below j, and the tables that lead back to the cuts before.
    start = np.full(num_layers + 1, np.inf)
    start[0] = 0.0
    states: dict[tuple[_Kind | None, ...], tuple[float, np.ndarray, list[np.ndarray]]] = {(): (0.0, start, [])}
    for _ in range(num_stages - 1):
        following: dict[tuple[_Kind | None, ...], tuple[float, np.ndarray, list[np.ndarray]]] = {}
        for path, (prefix, best, history) in states.items():
            source = path[-1] if path else None
            for kind in dict.fromkeys(kinds[:-1]):  # the network's output is no boundary
                aux = prefix + (cost_of(source, kind) if segments is not None and kind is not None else 0.0)
                own = aux + (heads(kind) if heads is not None and kind is not None else 0.0)
                if not np.isfinite(own):
                    continue
                largest = np.maximum(best[:, None], work + own)
                allowed = np.array([False, *(k == kind for k in kinds[:-1]), False])
                largest[:, ~allowed] = np.inf
                reached = largest.min(axis=0)
                if np.isfinite(reached).any():
                    following[(*path, kind)] = (aux, reached, [*history, largest.argmin(axis=0)])
        states = following
    candidates = []
    for prefix, best, history in states.values():
        last = np.maximum(best, work[:, num_layers] + prefix)
        cut = int(last.argmin())
        if np.isfinite(last[cut]):
            bounds = [num_layers, cut]
            for table in reversed(history):
                bounds.append(int(table[bounds[-1]]))
            candidates.append((float(last[cut]), tuple(reversed(bounds))))
    if not candidates:
        what = "the AuxNet can make" if heads is None else "have local heads"
        raise ValueError(f"the network cannot be cut into {num_stages} stages whose boundaries {what}.")
    _, bounds_found = min(candidates)
    return bounds_found, _stage_costs(bounds_found, total=total, kinds=kinds, cost_of=cost_of, head_of=heads)


def measure(module: nn.Module, spec: SampleSpec | Shape, *, micro_batch_size: int, device: torch.device) -> LayerTimes:
    """Median seconds of a forward and of a backward pass of a module, input gradient included.

    Args:
        module: what to time.
        spec: one sample of its input, or its shape.
        micro_batch_size: samples in the batch.
        device: where to time.
    """
    module = module.to(device).train()
    forward_s, backward_s = [], []
    for run in range(WARMUP_RUNS + TIMED_RUNS):
        batch = as_spec(spec).random(micro_batch_size, device=device)
        batch.requires_grad_(batch.is_floating_point())
        wait_for(device)
        started = time.perf_counter()
        output = module(batch)
        wait_for(device)
        halfway = time.perf_counter()
        gradient = torch.randn_like(output)  # as the next layer would hand it back
        wait_for(device)
        resumed = time.perf_counter()
        output.backward(gradient)
        wait_for(device)
        if run >= WARMUP_RUNS:
            forward_s.append(halfway - started)
            backward_s.append(time.perf_counter() - resumed)
    return LayerTimes(float(np.median(forward_s)), float(np.median(backward_s)))


def layer_times(
    layers: Sequence[Layer],
    before: Sequence[SampleSpec],
    *,
    micro_batch_size: int,
    device: torch.device,
    seed: int,
) -> tuple[LayerTimes, ...]:
    """Measure the layers of a network; those of equal structure and input are measured once.

    Args:
        layers: the network.
        before: what one sample is before each layer.
        micro_batch_size: samples in the batch.
        device: where to time.
        seed: the run's seed.
    """
    known: dict[tuple[str, SampleSpec], LayerTimes] = {}
    times = []
    for index, (layer, spec) in enumerate(zip(layers, before, strict=True)):
        module = build_layer(layer, index, seed=seed)
        kind = (repr(module), spec)
        if kind not in known:
            known[kind] = measure(module, spec, micro_batch_size=micro_batch_size, device=device)
        times.append(known[kind])
    return tuple(times)


def _stage_costs(
    bounds: Sequence[int],
    *,
    total: np.ndarray,
    kinds: Sequence[_Kind | None],
    cost_of: Callable[[_Kind | None, _Kind], float],
    head_of: Callable[[_Kind], float] | None,
) -> tuple[float, ...]:
    cuts = [kinds[cut - 1] for cut in bounds[1:-1]]
    steps = [
        0.0 if target is None else cost_of(source, target) for source, target in zip([None, *cuts], cuts, strict=False)
    ]
    prefix = np.concatenate([[0.0], np.cumsum(steps)])
    own = [0.0 if target is None or head_of is None else head_of(target) for target in cuts] + [0.0]
    num_stages = len(bounds) - 1
    return tuple(
        float(total[bounds[k + 1]] - total[bounds[k]] + prefix[min(k + 1, num_stages - 1)] + own[k])
        for k in range(num_stages)
    )


def _balanced(method: str, costs: Sequence[float], *, num_stages: int, unit: str) -> Partition:
    bounds, stage_costs = balance(costs, num_stages=num_stages)
    return Partition(bounds, stage_costs, unit=unit, method=method)


def _num_parameters(layer: Layer) -> int:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return sum(parameter.numel() for parameter in layer.make().parameters())


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
