"""What a chain of layers costs: parameters, multiply-accumulates, and what it keeps for its backward pass.

Found on PyTorch's meta device, without data, memory or time. `dsaux.dry_run` and the benchmarks ask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dsaux.models.shapes import SampleSpec, Shape, as_spec

_BATCH = 2  # BatchNorm refuses one sample of one pixel


@dataclass(frozen=True)
class Cost:
    """Figures of some layers.

    Attributes:
        parameters: number of them.
        multiply_accumulates: of a forward pass, per sample (convolutions and matrix products).
        saved_numbers: numbers that are kept from the forward to the backward pass, per sample; parameters left out.
        output_numbers: numbers in the output of one sample.
        saved_before: numbers of their input that they keep and a layer before them keeps as well, per sample; they are
            that layer's `saved_numbers`, and those of these layers where no such layer is at hand.
    """

    parameters: int
    multiply_accumulates: int
    saved_numbers: int
    output_numbers: int
    saved_before: int = 0


def chain_cost(makers: Sequence[Callable[[], nn.Module]], *, input_spec: SampleSpec) -> Cost:
    """Cost of layers that follow each other, together.

    Args:
        makers: build the layers, in order.
        input_spec: one sample of the first one's input.
    """
    costs = layer_costs(makers, input_spec=input_spec)
    return Cost(
        parameters=sum(cost.parameters for cost in costs),
        multiply_accumulates=sum(cost.multiply_accumulates for cost in costs),
        saved_numbers=sum(cost.saved_numbers for cost in costs),
        output_numbers=costs[-1].output_numbers if costs else math.prod(input_spec.shape),
    )


def layer_costs(makers: Sequence[Callable[[], nn.Module]], *, input_spec: SampleSpec) -> list[Cost]:
    """Cost of each of the layers that follow each other; what two of them keep is the first one's.

    Args:
        makers: build the layers, in order.
        input_spec: one sample of the first one's input.
    """
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        modules = [make().to("meta").train() for make in makers]
        own = {_storage(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
        saved: list[dict[int, Tensor]] = [{} for _ in modules]  # per layer what it is the first to keep, by storage
        keepers: dict[int, tuple[int, int]] = {}  # first and last layer that keeps a storage
        activations = [input_spec.empty(_BATCH, device="meta")]
        activations[0].requires_grad_(activations[0].is_floating_point())

        def keep(tensor: Tensor) -> Tensor:
            storage, layer = _storage(tensor), len(activations) - 1
            if storage not in own:
                if storage not in keepers:
                    saved[layer][storage] = tensor
                keepers[storage] = (keepers.get(storage, (layer, layer))[0], layer)
            return tensor

        operations = [0]
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for module in modules:
                activations.append(module(activations[-1]))
                operations.append(int(counter.get_total_flops()))
    # Halves are cut off the sums, so that the layers' figures add up to those of the chain.
    kept = list(itertools.accumulate((sum(map(_numbers, its.values())) for its in saved), initial=0))
    costs = []
    for index, (module, entering) in enumerate(zip(modules, activations, strict=False)):
        first, last = keepers.get(_storage(entering), (index, index))
        costs.append(
            Cost(
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                multiply_accumulates=operations[index + 1] // (2 * _BATCH) - operations[index] // (2 * _BATCH),
                saved_numbers=kept[index + 1] // _BATCH - kept[index] // _BATCH,
                output_numbers=activations[index + 1].numel() // _BATCH,
                saved_before=_numbers(entering) // _BATCH if first < index <= last else 0,
            )
        )
    return costs


def multiply_accumulates(make: Callable[[], nn.Module], *, input_spec: SampleSpec | Shape) -> int:
    """Multiply-accumulates of a forward pass for one sample.

    Args:
        make: builds the module.
        input_spec: one sample of its input, or its shape.
    """
    return chain_cost([make], input_spec=as_spec(input_spec)).multiply_accumulates


def _numbers(tensor: Tensor) -> int:
    """Of the whole storage, of which the tensor may be a view."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
