"""Where the network is cut: layer costs to stage bounds, the AuxNet's share counted.

Called once at the start, on rank 0 (`dsaux.assemble.agree_on_partition`). A stage's cost is that of its layers and of
the AuxNet's segments that its rank evaluates: with K stages, stage k needs lambda_k and its target lambda_(k+1), so
segments T_1 .. T_min(k+1, K-1). Late stages thus carry more of the AuxNet, and a balanced cut gives early stages more
layers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dsaux.launch_check import partition_indices
from dsaux.models import Layer, boundary_shapes, build_layer
from dsaux.models.auxnet import SEGMENTS, check_boundary
from dsaux.models.shapes import Shape

WARMUP_RUNS, TIMED_RUNS = 1, 5


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
    input_shape: Shape,
    aux_depth: int,
    aux_width: float,
    aux_segment: str,
    micro_batch_size: int,
    device: torch.device,
    with_aux: bool,
    seed: int,
) -> Partition:
    """Cut a network into stages.

    Args:
        method: "uniform" (equal numbers of layers), "parameters", "time" (measured here and now), or the layer that
            starts each stage after the first, by index or name.
        layers: the network.
        num_stages: number of stages K.
        input_shape: (C, H, W) of one image.
        aux_depth: residual blocks in an AuxNet segment.
        aux_width: width factor of the segments.
        aux_segment: kind of segment.
        micro_batch_size: samples in a micro-batch, for the timing.
        device: where to time.
        with_aux: whether stages evaluate the AuxNet; False for the 1f1b schedule.
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
    after = boundary_shapes(layers, input_shape=input_shape)
    before = [input_shape, *after[:-1]]
    times = _layer_times(layers, before, micro_batch_size=micro_batch_size, device=device, seed=seed)

    def segment_time(source: Shape, target: Shape, *, first: bool) -> float:
        check_boundary(source, target, boundary=0)
        segment = SEGMENTS[aux_segment](source, target, depth=aux_depth, width=aux_width, first=first)
        return measure(segment, source, micro_batch_size=micro_batch_size, device=device)

    segments = SegmentTimes(segment_time if with_aux else None, input_shape=input_shape)
    bounds, stage_costs = balance(times, num_stages=num_stages, shapes_after=after, segments=segments)
    return Partition(bounds, stage_costs, unit="s", method=method)


class SegmentTimes:
    """Time of an AuxNet segment between two boundary shapes, measured when first asked for.

    Args:
        measure: `measure(source, target, first=...) -> seconds`, raising ValueError where no segment fits; None counts
            no time.
        input_shape: shape of an image, the source of the first segment.
    """

    def __init__(self, measure: Callable[..., float] | None, *, input_shape: Shape) -> None:
        self.input_shape, self._measure = input_shape, measure
        self._known: dict[tuple[Shape | None, Shape], float] = {}

    def __call__(self, source: Shape | None, target: Shape) -> float:
        """Seconds of the segment from `source` (None: the images) to `target`; infinite where none is possible."""
        if self._measure is None:
            return 0.0
        if (source, target) not in self._known:
            try:
                seconds = self._measure(source or self.input_shape, target, first=source is None)
            except ValueError:
                seconds = float("inf")
            self._known[source, target] = seconds
        return self._known[source, target]


def balance(
    costs: Sequence[float],
    *,
    num_stages: int,
    shapes_after: Sequence[Shape] | None = None,
    segments: Callable[[Shape | None, Shape], float] | None = None,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Bounds with the smallest largest stage cost, exactly, by dynamic programming.

    The AuxNet's share of a stage depends on the shapes at all cuts before it, so a state is the path of shapes so far;
    a residual network has few shapes.

    Args:
        costs: cost of each layer.
        num_stages: number of stages K, at most the number of layers.
        shapes_after: shape after each layer; needed with `segments`.
        segments: `segments(source shape or None, target shape) -> cost` of an AuxNet segment.

    Returns:
        Bounds (K+1 indices) and the K stage costs.

    Raises:
        ValueError: if the AuxNet can make the shapes of no K-1 cuts.
    """
    num_layers = len(costs)
    total = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=float))])
    kinds = [None] * num_layers if shapes_after is None or segments is None else list(shapes_after)
    cost_of = segments if segments is not None and shapes_after is not None else (lambda source, target: 0.0)
    work = total[None, :] - total[:, None]  # work[i, j]: layers i .. j-1
    work[np.tril_indices(num_layers + 1)] = np.inf

    # A state, that is a path of shapes, holds the AuxNet's cost so far, for each cut j the smallest largest cost of the
    # stages below j, and the tables that lead back to the cuts before.
    start = np.full(num_layers + 1, np.inf)
    start[0] = 0.0
    states: dict[tuple[Shape | None, ...], tuple[float, np.ndarray, list[np.ndarray]]] = {(): (0.0, start, [])}
    for _ in range(num_stages - 1):
        following: dict[tuple[Shape | None, ...], tuple[float, np.ndarray, list[np.ndarray]]] = {}
        for path, (prefix, best, history) in states.items():
            source = path[-1] if path else None
            for kind in dict.fromkeys(kinds):
                aux = prefix + (cost_of(source, kind) if segments is not None and kind is not None else 0.0)
                if not np.isfinite(aux):
                    continue
                largest = np.maximum(best[:, None], work + aux)
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
        raise ValueError(f"the network cannot be cut into {num_stages} stages whose boundaries the AuxNet can make.")
    _, bounds_found = min(candidates)
    return bounds_found, _stage_costs(bounds_found, total=total, kinds=kinds, cost_of=cost_of)


def measure(module: nn.Module, shape: Shape, *, micro_batch_size: int, device: torch.device) -> float:
    """Median seconds of a forward and backward pass of a module, input gradient included.

    Args:
        module: what to time.
        shape: shape of one sample.
        micro_batch_size: samples in the batch.
        device: where to time.
    """
    module = module.to(device).train()
    seconds = []
    for run in range(WARMUP_RUNS + TIMED_RUNS):
        batch = torch.randn(micro_batch_size, *shape, device=device, requires_grad=True)
        _wait_for(device)
        started = time.perf_counter()
        module(batch).square().mean().backward()
        _wait_for(device)
        if run >= WARMUP_RUNS:
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _stage_costs(
    bounds: Sequence[int],
    *,
    total: np.ndarray,
    kinds: Sequence[Shape | None],
    cost_of: Callable[[Shape | None, Shape], float],
) -> tuple[float, ...]:
    shapes = [kinds[cut - 1] for cut in bounds[1:-1]]
    steps = [
        0.0 if target is None else cost_of(source, target)
        for source, target in zip([None, *shapes], shapes, strict=False)
    ]
    prefix = np.concatenate([[0.0], np.cumsum(steps)])
    num_stages = len(bounds) - 1
    return tuple(
        float(total[bounds[k + 1]] - total[bounds[k]] + prefix[min(k + 1, num_stages - 1)]) for k in range(num_stages)
    )


def _balanced(method: str, costs: Sequence[float], *, num_stages: int, unit: str) -> Partition:
    bounds, stage_costs = balance(costs, num_stages=num_stages)
    return Partition(bounds, stage_costs, unit=unit, method=method)


def _layer_times(
    layers: list[Layer], before: Sequence[Shape], *, micro_batch_size: int, device: torch.device, seed: int
) -> list[float]:
    known: dict[tuple[str, Shape], float] = {}
    times = []
    for index, (layer, shape) in enumerate(zip(layers, before, strict=True)):
        module = build_layer(layer, index, seed=seed)
        kind = (repr(module), shape)  # equal structure and input: equal time, measured once
        if kind not in known:
            known[kind] = measure(module, shape, micro_batch_size=micro_batch_size, device=device)
        times.append(known[kind])
    return times


def _num_parameters(layer: Layer) -> int:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return sum(parameter.numel() for parameter in layer.make().parameters())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
