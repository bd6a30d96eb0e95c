"""What the planner knows of a network: times and sizes.

`dsaux.plan_measure` makes a `Workload` here and now, `dsaux.plan_file` reads one of another machine, and a benchmark
may write one by hand. `dsaux.planner` predicts from it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from dsaux.partition import LayerTimes


@dataclass(frozen=True)
class SegmentCost:
    """What a segment of the AuxNet, or a head of a local loss, takes.

    Attributes:
        forward_s: seconds of its forward pass for a micro-batch.
        backward_s: seconds of its backward pass.
        update_s: seconds of its optimizer step.
        parameter_bytes: of its parameters.
        kept_bytes: per sample, kept for its backward pass.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0
    parameter_bytes: int = 0
    kept_bytes: int = 0

    @property
    def is_possible(self) -> bool:
        """False for a boundary that no segment reaches."""
        return math.isfinite(self.forward_s)


IMPOSSIBLE = SegmentCost(forward_s=math.inf)
"""For a boundary that no segment reaches."""


@dataclass(frozen=True)
class BackwardSplit:
    """A backward pass taken apart, as zero-bubble pipelines do; shares of the time of a whole one.

    Attributes:
        input_share: the part that makes the gradient by the input.
        weight_share: the part that makes those by the weights. Both together may be more than 1: what the taking apart
            costs.
    """

    input_share: float = 0.5
    weight_share: float = 0.5


@dataclass(frozen=True)
class Workload:
    """What a device needs for the parts of a network. Layers are in order; a cut c lies before layer c.

    Attributes:
        layer_names: the layers.
        times: per number of samples in a micro-batch, what each layer takes. Sizes that are not there are asked of
            `measure_size`, or without it read off the straight line through the two nearest; beyond the largest,
            times are taken as proportional to the samples, and below the smallest as at least that.
        update_s: seconds of the optimizer step, per layer.
        parameter_bytes: per layer.
        activation_bytes: of one sample after each layer.
        kept_bytes: of one sample, kept for the backward pass, per layer; what two layers keep is the first one's.
        segment_cost: `segment_cost(source cut or None, target cut, micro_batch_size)` of the AuxNet's segments;
            `IMPOSSIBLE` where there is none. None takes the AuxNet as free.
        head_cost: `head_cost(cut, micro_batch_size)` of a local loss's head; None takes heads as free.
        kinds: per layer a number, equal where the boundary behind it is of the same kind, so that its segments cost
            the same; empty takes boundaries of equal size as of one kind.
        overhead_s: the engine's own time per micro-batch and rank.
        states_per_parameter: numbers that the stages' optimizer remembers for each parameter.
        aux_states_per_parameter: that the AuxNet's does; None for as many.
        kept_before_bytes: of one sample, per layer, what of its input it keeps and a layer before keeps too: it is in
            that layer's `kept_bytes`, and comes to those of a piece that begins with this one. Empty for nothing.
        network: its name, so that times are not taken for those of another one.
        device: where times were measured, in words.
        timed_up_to: largest micro-batch that was really timed; larger ones were scaled. 0: all were.
        measure_size: `measure_size(micro_batch_size)` gives times that are not in `times`.
        splits: per number of samples in a micro-batch, what taking a backward pass apart costs.
        measure_split: `measure_split(micro_batch_size)` gives those that are not in `splits`; without it that of the
            nearest size is taken, or halves where there is none.
    """

    layer_names: tuple[str, ...]
    times: Mapping[int, tuple[LayerTimes, ...]]
    update_s: tuple[float, ...]
    parameter_bytes: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    kept_bytes: tuple[int, ...]
    segment_cost: Callable[[int | None, int, int], SegmentCost] | None = None
    head_cost: Callable[[int, int], SegmentCost] | None = None
    kinds: tuple[int, ...] = ()
    overhead_s: float = 0.0
    states_per_parameter: float = 1.0
    aux_states_per_parameter: float | None = None
    kept_before_bytes: tuple[int, ...] = ()
    network: str = ""
    device: str = "unknown"
    timed_up_to: int = 0
    measure_size: Callable[[int], tuple[LayerTimes, ...]] | None = None
    splits: Mapping[int, BackwardSplit] = field(default_factory=dict)
    measure_split: Callable[[int], BackwardSplit] | None = None
    _layers: dict[int, tuple[LayerTimes, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _segments: dict[tuple[int | None, int, int], SegmentCost] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _splits: dict[int, BackwardSplit] = field(default_factory=dict, init=False, repr=False, compare=False)
    _heads: dict[tuple[int, int], SegmentCost] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse lists that do not fit together.

        Raises:
            ValueError: if there are no layers or no times, or a list has another length.
        """
        lengths = {len(self.update_s), len(self.parameter_bytes), len(self.activation_bytes), len(self.kept_bytes)}
        lengths |= {len(times) for times in self.times.values()}
        lengths |= {len(its) for its in (self.kinds, self.kept_before_bytes) if its}
        if lengths != {len(self.layer_names)} or not self.layer_names:
            raise ValueError(f"a workload of {len(self.layer_names)} layers has lists of {sorted(lengths)} entries.")
        if not self.times and self.measure_size is None:
            raise ValueError("a workload has no times; give those of one micro-batch size at least.")
        self._layers.update(self.times)
        self._splits.update(self.splits)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_names)

    def kind(self, cut: int) -> int:
        """The kind of boundary before layer `cut`."""
        return (self.kinds or self.activation_bytes)[cut - 1]

    def layer_times(self, micro_batch_size: int) -> tuple[LayerTimes, ...]:
        """What each layer takes for a micro-batch of so many samples."""
        if micro_batch_size not in self._layers:
            if self.measure_size is not None:
                self._layers[micro_batch_size] = self.measure_size(micro_batch_size)
            else:
                return _mix_layers(self.times, micro_batch_size)
        return self._layers[micro_batch_size]

    def split(self, micro_batch_size: int) -> BackwardSplit:
        """What taking a backward pass of so many samples apart costs."""
        if micro_batch_size not in self._splits:
            if self.measure_split is None:
                nearest = min(self._splits, key=lambda size: abs(math.log(size / micro_batch_size)), default=None)
                return BackwardSplit() if nearest is None else self._splits[nearest]
            self._splits[micro_batch_size] = self.measure_split(micro_batch_size)
        return self._splits[micro_batch_size]

    def segment(self, source: int | None, target: int, micro_batch_size: int) -> SegmentCost:
        """Cost of the AuxNet's segment from one cut (None: the data) to another."""
        if self.segment_cost is None:
            return SegmentCost()
        place = (None if source is None else self._first_of(source), self._first_of(target), micro_batch_size)
        if place not in self._segments:
            self._segments[place] = self.segment_cost(*place)
        return self._segments[place]

    def head(self, cut: int, micro_batch_size: int) -> SegmentCost:
        """Cost of the local loss's head at a cut."""
        if self.head_cost is None:
            return SegmentCost()
        place = (self._first_of(cut), micro_batch_size)
        if place not in self._heads:
            self._heads[place] = self.head_cost(*place)
        return self._heads[place]

    def _first_of(self, cut: int) -> int:
        """The first cut of the same kind: what is measured for one of them holds for all."""
        kind = self.kind(cut)
        return next(index + 1 for index, other in enumerate(self.kinds or self.activation_bytes) if other == kind)


def _mix_layers(table: Mapping[int, tuple[LayerTimes, ...]], size: int) -> tuple[LayerTimes, ...]:
    columns = zip(*table.values(), strict=True)
    return tuple(
        LayerTimes(
            _seconds_at({known: time.forward_s for known, time in zip(table, column, strict=True)}, size),
            _seconds_at({known: time.backward_s for known, time in zip(table, column, strict=True)}, size),
        )
        for column in columns
    )


def mix_costs(table: Mapping[int, SegmentCost], size: int) -> SegmentCost:
    """Cost of a segment at a size that was not timed, from those that were."""
    if not all(cost.is_possible for cost in table.values()):
        return IMPOSSIBLE
    return replace(
        next(iter(table.values())),
        forward_s=_seconds_at({known: cost.forward_s for known, cost in table.items()}, size),
        backward_s=_seconds_at({known: cost.backward_s for known, cost in table.items()}, size),
    )


def _seconds_at(table: Mapping[int, float], size: int) -> float:
    """Seconds at a size that was not timed.

    Between two sizes those of the straight line through both; beyond the largest, and where there is one alone, in
    proportion. Below the smallest those of the line as well, but between its time in proportion and all of it: a line
    through two sizes may come to nothing on the way.
    """
    known = sorted(table)
    smallest, largest = known[0], known[-1]
    if len(known) == 1 or size > largest:
        return table[largest] * (size / largest)
    right = max(bisect_left(known, size), 1)
    low, high = known[right - 1], known[right]
    share = (size - low) / (high - low)
    seconds = table[low] * (1.0 - share) + table[high] * share
    if size < smallest:
        return min(max(seconds, table[smallest] * (size / smallest)), table[smallest])
    return seconds
