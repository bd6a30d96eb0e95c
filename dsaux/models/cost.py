"""What a chain of layers costs: parameters, multiply-accumulates, and what it keeps for its backward pass.

Found on PyTorch's meta device, without data, memory or time. `dsaux.dry_run` and the benchmarks ask.
"""

from __future__ import annotations

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
    """

    parameters: int
    multiply_accumulates: int
    saved_numbers: int
    output_numbers: int


def chain_cost(makers: Sequence[Callable[[], nn.Module]], *, input_spec: SampleSpec) -> Cost:
    """Cost of layers that follow each other.

    Args:
        makers: build the layers, in order.
        input_spec: one sample of the first one's input.
    """
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        modules = [make().to("meta").train() for make in makers]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        own = {_storage(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
        saved: dict[int, Tensor] = {}  # by storage: the same activation may be kept by two operations

        def keep(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in own:
                saved[_storage(tensor)] = tensor
            return tensor

        x = input_spec.empty(_BATCH, device="meta")
        x.requires_grad_(x.is_floating_point())
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for module in modules:
                x = module(x)
        return Cost(
            parameters=sum(parameter.numel() for parameter in parameters),
            multiply_accumulates=int(counter.get_total_flops()) // (2 * _BATCH),
            saved_numbers=sum(_numbers(tensor) for tensor in saved.values()) // _BATCH,
            output_numbers=x.numel() // _BATCH,
        )


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
