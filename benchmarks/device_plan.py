"""What `benchmarks/device.py` measures: networks, cuts, precisions and ways to run, in the order of their weight."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stage_step import Stage

from dsaux.aux_cost import aux_cost
from dsaux.models import Layer, build_layers


@dataclass(frozen=True)
class Network:
    """A network, its AuxNet, and how it is cut and fed.

    Attributes:
        model: its name.
        stages: K.
        batch: samples in a step.
        image_size: side of the images in pixels.
        segment: kind of the AuxNet's segments, as in `dsaux.aux.segment`.
        width: their width, as in `dsaux.aux.width`.
    """

    model: str
    stages: int
    batch: int
    image_size: int
    segment: str = "light"
    width: float = 1.0

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The list of layers; raises ImportError where a package is missing."""
        classes, shape = self.num_classes, (3, self.image_size, self.image_size)
        return tuple(build_layers(self.model, num_classes=classes, input_spec=shape))

    @property
    def num_classes(self) -> int:
        """Of CIFAR or ImageNet."""
        return 10 if self.image_size <= 64 else 1000

    @functools.cached_property
    def bounds(self) -> tuple[int, ...]:
        """Stages of equal multiply-accumulates, their part of the AuxNet included."""
        if self.stages == 1:
            return (0, len(self.layers))
        shape = (3, self.image_size, self.image_size)
        aux = {"segment": self.segment, "width": self.width}
        return aux_cost(self.layers, input_spec=shape, num_stages=self.stages, **aux).bounds


@dataclass(frozen=True)
class Measurement:
    """One line of results to come."""

    network: Network
    index: int
    precision: str
    mode: str
    channels_last: bool = True

    @property
    def case(self) -> str:
        """Its name."""
        network = self.network
        return f"{network.model}, batch {network.batch}, K={network.stages}, stage {self.index}"

    def stage(self) -> Stage:
        """What is measured."""
        network = self.network
        return Stage(
            network.layers,
            network.bounds,
            self.index,
            batch=network.batch,
            image_size=network.image_size,
            num_classes=network.num_classes,
            segment=network.segment,
            width=network.width,
            precision=self.precision,
            channels_last=self.channels_last,
        )


TINY = Network("resnet8", 2, 8, 16)
RESNET110, RESNET56, RESNET20 = (Network(name, 3, 128, 32) for name in ("resnet110", "resnet56", "resnet20"))
WIDE = Network("wrn28_10", 4, 128, 32, "bottleneck", 2.0)
RESNET50 = Network("resnet50", 4, 256, 224, "bottleneck", 0.5)
RESNET101 = Network("resnet101", 4, 256, 224, "bottleneck", 1.0)
WHOLE_RESNET50 = Network("resnet50", 1, 256, 224)


def plan(*, quick: bool) -> list[Measurement]:
    """All measurements, the most important ones first."""
    if quick:
        return [*_grid(TINY, ("fp32", "bf16"), ("eager", "graphed", "compiled", "compiled graphed"))]
    both, first = ("fp32", "bf16"), ("eager", "graphed")
    return [
        *_grid(RESNET110, both, first),
        *_grid(WHOLE_RESNET50, ("bf16",), ("bare", "compiled", "compiled graphed", "graphed", "eager")),
        *_grid(RESNET110, ("bf16", "fp32"), ("compiled graphed",)),
        *_grid(RESNET50, ("bf16",), (*first, "compiled graphed")),
        *_grid(WIDE, ("bf16",), first),
        *_grid(WHOLE_RESNET50, ("bf16",), ("graphed", "compiled graphed"), channels_last=False),
        *_grid(RESNET110, ("fp32", "bf16"), ("graphed",), channels_last=False),
        *_grid(WIDE, ("bf16",), ("graphed",), channels_last=False),
        *_grid(RESNET50, ("bf16",), ("graphed",), channels_last=False),
        *_grid(RESNET110, both, ("graphed aside",), stages=(0, 1)),
        *_grid(RESNET20, both, ("graphed aside",), stages=(0, 1)),
        *_grid(RESNET50, ("bf16",), ("graphed aside",), stages=(0, 1, 2)),
        *_grid(WIDE, ("bf16",), ("graphed aside",), stages=(0, 1, 2)),
        *_grid(RESNET20, both, first),
        *_grid(RESNET56, both, first),
        *_grid(RESNET110, both, ("compiled",)),
        *_grid(RESNET50, ("bf16",), ("compiled",)),
        *_grid(RESNET101, ("bf16",), first),
        *_grid(WIDE, ("fp32",), first),
        *_grid(RESNET50, ("fp32",), first),
        *_grid(RESNET101, ("fp32",), first),
        *_grid(WHOLE_RESNET50, ("fp32",), ("bare", "graphed", "eager")),
        *_grid(RESNET20, both, ("compiled",)),
        *_grid(RESNET56, both, ("compiled",)),
        *_grid(WIDE, both, ("compiled",)),
        *_grid(RESNET101, both, ("compiled",)),
        *_grid(RESNET50, ("fp32",), ("compiled",)),
    ]


def _grid(
    network: Network,
    precisions: Sequence[str],
    modes: Sequence[str],
    *,
    channels_last: bool = True,
    stages: Sequence[int] | None = None,
) -> Iterator[Measurement]:
    indices = range(network.stages) if stages is None else stages
    for precision, index, mode in itertools.product(precisions, indices, modes):
        yield Measurement(network, index, precision, mode, channels_last)
