"""Shapes and multiply-accumulates of layers, found on PyTorch's meta device: no data, no memory, no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]
"""Shape of one sample, without the batch."""


def shapes_after(makers: Iterable[Callable[[], nn.Module]], *, input_shape: Shape) -> list[Shape]:
    """Shape of one sample after each layer of a chain.

    Args:
        makers: builders of the layers, in order.
        input_shape: shape of one sample of the first layer's input.

    Raises:
        ValueError: if a layer does not take what the one before it makes.
    """
    shapes: list[Shape] = []
    shape = input_shape
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        for index, make in enumerate(makers):
            sample = torch.empty(2, *shape)
            try:
                shape = tuple(make().to("meta")(sample).shape[1:])
            except RuntimeError as error:
                raise ValueError(f"layer {index} does not take a sample of shape {shape}: {error}") from error
            shapes.append(shape)
    return shapes


def multiply_accumulates(make: Callable[[], nn.Module], *, input_shape: Shape) -> int:
    """Multiply-accumulates of a forward pass for one sample (convolutions and matrix products).

    Args:
        make: builds the module.
        input_shape: shape of one sample.
    """
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.random.fork_rng(devices=[]), counter:
        make().to("meta")(torch.empty(2, *input_shape))
    return int(counter.get_total_flops()) // 4  # two samples, a multiplication and an addition each
