"""What all contestants of a case train: the same layers, weights, batches and optimizer settings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from sleepers import Sleeper, SleepingLayer
from torch import Tensor, nn

from dsaux.assemble import cross_entropy
from dsaux.config import ModelConfig
from dsaux.models import Layer, build_layer, build_layers
from dsaux.models.shapes import SampleSpec

SLEEP_CHANNELS, SLEEP_CLASSES = 4, 5
NUM_BATCHES = 4
"""Distinct global batches; contestants cycle through them."""
CHUNKS_PER_RANK = 2
"""Sleeping layers of a rank: schedules that give a rank two chunks of the network get one layer in each."""
OPTIMIZER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
"""Of `torch.optim.SGD`, for stages and AuxNets alike."""


@dataclass(frozen=True)
class Work:
    """A network, its data and its optimizer, the same on every rank and for every contestant.

    Attributes:
        layers: the network.
        input_spec: one sample.
        num_classes: of the labels.
        global_batch: samples in a step, all ranks together.
        seed: of weights and data.
        sleeper: of sleeping layers; None for real ones.
        aux_width: width of dsaux's AuxNet, as in `dsaux.aux.width`.
    """

    layers: tuple[Layer, ...]
    input_spec: SampleSpec
    num_classes: int
    global_batch: int
    seed: int = 0
    sleeper: Sleeper | None = None
    aux_width: float = 1.0

    def build(self, first: int, last: int) -> nn.Sequential:
        """Layers first .. last-1, with the weights that they have in every contestant."""
        return nn.Sequential(*(build_layer(self.layers[index], index, seed=self.seed) for index in range(first, last)))

    @functools.cached_property
    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Global batches: inputs, float32 (B, ...), and labels, int64 (B,)."""
        draw = torch.Generator().manual_seed(self.seed)
        shape = (self.global_batch, *self.input_spec.shape)
        labels = torch.arange(self.global_batch) % self.num_classes
        return [(torch.randn(shape, generator=draw), labels) for _ in range(NUM_BATCHES)]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The global batch of a step, counted from 0."""
        return self.batches[step % NUM_BATCHES]

    def share(self, step: int, *, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
        """A rank's share of the global batch of a step."""
        inputs, labels = (part.chunk(ranks)[rank] for part in self.batch(step))
        return inputs, labels

    def micro_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of all steps without end, `count` to a step."""
        for step in itertools.count():
            inputs, labels = self.batch(step)
            yield from zip(inputs.chunk(count), labels.chunk(count), strict=True)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """SGD for a module."""
        return torch.optim.SGD(module.parameters(), **OPTIMIZER)


loss_of = cross_entropy
"""`loss_of(scores, labels)`, mean over the samples, for every contestant."""


def model_work(
    model: str, *, image_size: int, global_batch: int, num_classes: int = 10, seed: int = 0, aux_width: float = 1.0
) -> Work:
    """A network by its name, on random images."""
    spec = SampleSpec((3, image_size, image_size))
    layers = build_layers(ModelConfig(name=model), num_classes=num_classes, input_spec=spec)
    return Work(tuple(layers), spec, num_classes, global_batch, seed, aux_width=aux_width)


def sleeping_work(*, stages: int, global_batch: int, forward_s: float, backward_s: float, seed: int = 0) -> Work:
    """Layers that sleep, `CHUNKS_PER_RANK` for each stage.

    Args:
        stages: ranks of the pipelines.
        global_batch: samples in a step.
        forward_s: sleep of a stage in the forward passes of a step; who gives a rank other samples or layers sleeps
            in proportion.
        backward_s: likewise in the backward passes.
        seed: of weights and data.
    """
    parts = global_batch * CHUNKS_PER_RANK
    sleeper = Sleeper(forward_s=forward_s / parts, backward_s=backward_s / parts)
    count = stages * CHUNKS_PER_RANK

    def make(index: int) -> nn.Module:
        if index == count - 1:
            head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(SLEEP_CHANNELS, SLEEP_CLASSES))
            return SleepingLayer(head, sleeper)
        return SleepingLayer(nn.Conv2d(3 if index == 0 else SLEEP_CHANNELS, SLEEP_CHANNELS, 1), sleeper)

    layers = tuple(Layer(f"sleep{index}", functools.partial(make, index)) for index in range(count))
    return Work(layers, SampleSpec((3, 8, 8)), SLEEP_CLASSES, global_batch, seed, sleeper)
