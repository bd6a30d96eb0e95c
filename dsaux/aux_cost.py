"""What the AuxNet costs beside the network, counted and not measured: multiply-accumulates and parameters.

`benchmarks/aux_cost.py` prints it; the cut that it assumes is the one with equal multiply-accumulates, the AuxNet's
share in each stage included.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dsaux.models import Layer, boundary_specs
from dsaux.models.auxnet import make_segment
from dsaux.models.cost import multiply_accumulates
from dsaux.models.shapes import SampleSpec, Shape, as_spec
from dsaux.partition import SegmentTimes, balance


@dataclass(frozen=True)
class AuxCost:
    """The AuxNet's whole chain, once, beside the whole network.

    Attributes:
        bounds: K+1 layer indices.
        network_macs: multiply-accumulates of a forward pass of the network for one sample.
        aux_macs: those of the AuxNet.
        network_parameters: number of the network's parameters.
        aux_parameters: number of the AuxNet's.
    """

    bounds: tuple[int, ...]
    network_macs: int
    aux_macs: int
    network_parameters: int
    aux_parameters: int

    @property
    def macs_share(self) -> float:
        """The AuxNet's multiply-accumulates, as a share of the network's."""
        return self.aux_macs / self.network_macs

    @property
    def parameters_share(self) -> float:
        """The AuxNet's parameters, as a share of the network's."""
        return self.aux_parameters / self.network_parameters


def aux_cost(
    layers: Sequence[Layer],
    *,
    input_spec: SampleSpec | Shape,
    num_stages: int,
    segment: str = "light",
    depth: int = 1,
    width: float = 1.0,
) -> AuxCost:
    """Count the AuxNet's cost for a network cut into stages of equal multiply-accumulates.

    Args:
        layers: the network.
        input_spec: one sample of the data, or its shape.
        num_stages: number of stages K.
        segment: a name in `dsaux.models.auxnet.SEGMENTS`.
        depth: residual blocks in a segment.
        width: the segments' width.

    Raises:
        ValueError: if the AuxNet can make the shapes of no K-1 cuts.
    """
    spec = as_spec(input_spec)
    after = boundary_specs(list(layers), input_spec=spec)
    before = [spec, *after[:-1]]
    macs = [multiply_accumulates(layer.make, input_spec=at) for layer, at in zip(layers, before, strict=True)]

    def build(source: SampleSpec, target: SampleSpec, *, first: bool) -> nn.Module:
        return make_segment(source, target, kind=segment, depth=depth, width=width, first=first)

    def segment_macs(source: SampleSpec, target: SampleSpec, *, first: bool) -> float:
        return float(multiply_accumulates(lambda: build(source, target, first=first), input_spec=source))

    costs = SegmentTimes(segment_macs, input_spec=spec)
    bounds, _ = balance(macs, num_stages=num_stages, specs_after=after, segments=costs)
    sources = [None, *(after[cut - 1] for cut in bounds[1:-1])]
    pairs = list(itertools.pairwise(sources))
    aux_macs = sum(int(costs(source, target)) for source, target in pairs if target is not None)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = sum(_num_parameters(layer.make()) for layer in layers)
        aux = sum(
            _num_parameters(build(source or spec, target, first=source is None))
            for source, target in pairs
            if target is not None
        )
    return AuxCost(bounds, sum(macs), aux_macs, network, aux)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
