"""Measures what the planner needs, in one process on one device: layers, the AuxNet's segments, the optimizer.

The measuring itself is that of `dsaux.partition`, which cuts runs by it. A layer that is timed again and again finds
its data in the caches, and its neighbours idle. So the whole network is timed as well, with as many other processes
computing as there will be ranks beside this one, and the layers' times are scaled to it: the layers say how the time
divides, the chain how much it is. Sizes of micro-batches and segments are measured when they are first asked for.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsaux.config_rules import ConfigError
from dsaux.memory import states_per_parameter
from dsaux.models import Layer, boundary_specs, build_layer
from dsaux.models.auxnet import make_segment
from dsaux.models.cost import Cost, chain_cost, layer_costs
from dsaux.models.shapes import SampleSpec, Shape, as_spec
from dsaux.optim import make_aux_optimizer
from dsaux.partition import TIMED_RUNS, LayerTimes, layer_times, measure, wait_for
from dsaux.plan_neighbours import Neighbours
from dsaux.plan_split import measure_split
from dsaux.plan_workload import IMPOSSIBLE, BackwardSplit, SegmentCost, Workload
from dsaux.runtime import keep_freed_memory

_NUMBER = 4
"""Bytes of a number: times are measured in float32, sizes counted in it."""

_Before = tuple[Callable[[], nn.Module], SampleSpec]
"""Builds what stands before a part, and a sample of its input."""


def measure_workload(
    layers: list[Layer],
    *,
    input_spec: SampleSpec | Shape,
    micro_batch_sizes: Sequence[int],
    device: torch.device,
    aux_depth: int = 1,
    aux_width: float = 1.0,
    aux_segment: str = "light",
    seed: int = 0,
    optimizer: tuple[str, Mapping[str, Any]] = ("SGD", {"lr": 0.1, "momentum": 0.9}),
    aux_optimizer: tuple[str, Mapping[str, Any]] | None = None,
    make_head: Callable[[SampleSpec, SampleSpec], nn.Module] | None = None,
    timed_up_to: int = 0,
    neighbours: int = 0,
    say: Callable[[str], None] | None = None,
) -> Workload:
    """Measure a network here and now; more sizes are measured when they are asked for.

    Args:
        layers: the network.
        input_spec: one sample of the data, or its shape.
        micro_batch_sizes: sizes to measure at once.
        device: where to time.
        aux_depth: residual blocks in an AuxNet segment.
        aux_width: width factor of the segments.
        aux_segment: kind of segment.
        seed: the run's seed.
        optimizer: the stages', its name in torch.optim and parameters.
        aux_optimizer: the AuxNet's; None for the same.
        make_head: `make_head(boundary, scores)` builds the head of a local loss, raising ValueError where there is
            none; None takes heads as free.
        timed_up_to: largest micro-batch to time, larger ones are scaled from it; 0 times all.
        neighbours: processes that compute on other cores meanwhile, on a CPU: the ranks beside one.
        say: is told what is being timed, now and later.
    """
    say = say or (lambda _: None)
    if device.type == "cpu":
        keep_freed_memory()  # as ranks do
    meter = _Meter(
        layers, as_spec(input_spec), device=device, seed=seed, timed_up_to=timed_up_to, neighbours=neighbours, say=say
    )
    costs = meter.costs()
    say("timing the optimizer")
    update_s_per_byte = aux_update_s_per_byte = meter.update_s_per_byte(optimizer)
    if aux_optimizer is not None and aux_optimizer != optimizer:
        say("timing the AuxNet's optimizer")
        aux_update_s_per_byte = meter.update_s_per_byte(aux_optimizer)
    parameter_bytes = tuple(_NUMBER * cost.parameters for cost in costs)

    def make_aux(source: int | None, target: int) -> tuple[nn.Module, SampleSpec]:
        start = meter.spec if source is None else meter.after[source - 1]
        end = meter.after[target - 1]
        first = source is None
        return make_segment(start, end, kind=aux_segment, depth=aux_depth, width=aux_width, first=first), start

    def segment_cost(source: int | None, target: int, size: int) -> SegmentCost:
        return meter.part_cost(
            lambda: make_aux(source, target),
            size,
            before=None if source is None else (lambda: make_aux(None, source)[0], meter.spec),
            update_s_per_byte=aux_update_s_per_byte,
            name="AuxNet segments",
        )

    def head_cost(cut: int, size: int) -> SegmentCost:
        assert make_head is not None
        spec = meter.after[cut - 1]
        make = make_head
        return meter.part_cost(
            lambda: (make(spec, meter.after[-1]), spec),
            size,
            before=(layers[cut - 1].make, meter.before[cut - 1]),
            update_s_per_byte=update_s_per_byte,
            name="local heads",
        )

    numbers = {spec: number for number, spec in enumerate(dict.fromkeys(meter.after))}
    return Workload(
        layer_names=tuple(layer.name for layer in layers),
        times={size: meter.layers_at(size) for size in micro_batch_sizes},
        update_s=tuple(size * update_s_per_byte for size in parameter_bytes),
        parameter_bytes=parameter_bytes,
        activation_bytes=tuple(_NUMBER * cost.output_numbers for cost in costs),
        kept_bytes=tuple(_NUMBER * cost.saved_numbers for cost in costs),
        segment_cost=segment_cost,
        head_cost=None if make_head is None else head_cost,
        kinds=tuple(numbers[spec] for spec in meter.after),
        states_per_parameter=states_per_parameter(*optimizer),
        aux_states_per_parameter=states_per_parameter(*(aux_optimizer or optimizer)),
        kept_before_bytes=tuple(_NUMBER * cost.saved_before for cost in costs),
        device=device_words(device, neighbours=neighbours),
        timed_up_to=timed_up_to,
        measure_size=meter.layers_at,
        measure_split=meter.split_at,
    )


def device_words(device: torch.device, *, neighbours: int) -> str:
    """What was measured on, for people: the GPU's name, or the CPU, its threads, and who computed beside it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    beside = f" beside {neighbours} busy process{'es' * (neighbours != 1)}" if neighbours else ""
    return f"{device.type}, {threads} thread{'s' * (threads != 1)}{beside}"


class _Meter:
    """A network on a device."""

    def __init__(
        self,
        layers: list[Layer],
        spec: SampleSpec,
        *,
        device: torch.device,
        seed: int,
        timed_up_to: int,
        neighbours: int,
        say: Callable[[str], None],
    ) -> None:
        self.network, self.spec, self.device, self.seed, self.timed_up_to = layers, spec, device, seed, timed_up_to
        self.after = boundary_specs(layers, input_spec=spec)
        self.before = [spec, *self.after[:-1]]
        self._say = say
        self._neighbours = Neighbours(neighbours, threads=torch.get_num_threads())
        self._known: dict[int, tuple[tuple[LayerTimes, ...], LayerTimes]] = {}

    def layers_at(self, size: int) -> tuple[LayerTimes, ...]:
        """Times of all layers at a size of the micro-batch."""
        timed, scale = self._timed(size)
        return tuple(LayerTimes(scale * its.forward_s, scale * its.backward_s) for its in self._measured(timed)[0])

    def split_at(self, size: int) -> BackwardSplit:
        """What taking the backward pass of the whole network apart costs."""
        timed, _ = self._timed(size)
        self._say_timing("the backward pass in two halves", timed)
        with self._busy_neighbours(timed):
            return measure_split(self._chain(), self.spec, micro_batch_size=timed, device=self.device)

    def costs(self) -> list[Cost]:
        """Sizes of all layers."""
        return layer_costs([layer.make for layer in self.network], input_spec=self.spec)

    def part_cost(
        self,
        make: Callable[[], tuple[nn.Module, SampleSpec]],
        size: int,
        *,
        before: _Before | None,
        update_s_per_byte: float,
        name: str,
    ) -> SegmentCost:
        """Measure a segment of the AuxNet or a head, and count it; `IMPOSSIBLE` where there is none.

        Args:
            make: builds it, and says what a sample of its input is.
            size: samples in a micro-batch.
            before: what makes its input; None for the data.
            update_s_per_byte: seconds of its optimizer's step.
            name: of such parts, for what is said.
        """
        try:
            module, spec = make()
        except ConfigError:  # a user's own segment that fails is no segment that does not exist
            raise
        except ValueError:
            return IMPOSSIBLE
        timed, scale = self._timed(size)
        self._say_timing(name, timed)
        times = measure(module, spec, micro_batch_size=timed, device=self.device)
        _, ratio = self._measured(timed)
        sizes = _cost_behind(before, lambda: make()[0], spec)
        parameter_bytes = _NUMBER * sizes.parameters
        return SegmentCost(
            forward_s=scale * ratio.forward_s * times.forward_s,
            backward_s=scale * ratio.backward_s * times.backward_s,
            update_s=parameter_bytes * update_s_per_byte,
            parameter_bytes=parameter_bytes,
            kept_bytes=_NUMBER * sizes.saved_numbers,
        )

    def update_s_per_byte(self, optimizer: tuple[str, Mapping[str, Any]]) -> float:
        """Seconds of an optimizer step of the whole network, per byte of its parameters; the median of some."""
        parameters: list[Tensor] = list(self._chain().parameters())
        size = _NUMBER * sum(parameter.numel() for parameter in parameters)
        if not size:
            return 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        stepper = make_aux_optimizer(parameters, *optimizer)
        stepper.step()  # makes its state
        seconds = []
        for _ in range(TIMED_RUNS):
            wait_for(self.device)
            started = time.perf_counter()
            stepper.step()
            wait_for(self.device)
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[len(seconds) // 2] / size

    def _measured(self, timed: int) -> tuple[tuple[LayerTimes, ...], LayerTimes]:
        """Times of all layers at a size that is timed, and what they were multiplied by to come to the chain's."""
        if timed not in self._known:
            self._say_timing("layers", timed)
            alone = layer_times(self.network, self.before, micro_batch_size=timed, device=self.device, seed=self.seed)
            with self._busy_neighbours(timed):
                chain = measure(self._chain(), self.spec, micro_batch_size=timed, device=self.device)
            ratio = LayerTimes(
                chain.forward_s / sum(its.forward_s for its in alone),
                chain.backward_s / sum(its.backward_s for its in alone),
            )
            scaled = tuple(
                LayerTimes(ratio.forward_s * its.forward_s, ratio.backward_s * its.backward_s) for its in alone
            )
            self._known[timed] = scaled, ratio
        return self._known[timed]

    def _say_timing(self, what: str, samples: int) -> None:
        self._say(f"timing {what}, {samples} sample{'s' * (samples != 1)}")

    def _busy_neighbours(self, size: int) -> contextlib.AbstractContextManager[None]:
        """The ranks beside this one at work, with activations of the size that the network's have on average."""
        numbers = sum(math.prod(spec.shape) for spec in self.after) / len(self.after)
        return self._neighbours.busy(numbers=round(size * numbers))

    def _chain(self) -> nn.Sequential:
        """The whole network."""
        modules = [build_layer(layer, index, seed=self.seed) for index, layer in enumerate(self.network)]
        return nn.Sequential(*modules).to(self.device)

    def _timed(self, size: int) -> tuple[int, float]:
        """The size to time instead, and the factor from there."""
        timed = min(size, self.timed_up_to) if self.timed_up_to else size
        return timed, size / timed


def _cost_behind(before: _Before | None, make: Callable[[], nn.Module], spec: SampleSpec) -> Cost:
    """Cost of a part on samples like `spec`; what is kept before it already does not count again."""
    if before is not None:
        make_before, start = before
        with contextlib.suppress(ValueError):  # nothing leads there in one go: the part is taken alone
            return layer_costs([make_before, make], input_spec=start)[-1]
    return chain_cost([make], input_spec=spec)
