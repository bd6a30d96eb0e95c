"""What a sample is at each place of a network; shapes are found on the meta device: no data, no memory, no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
"""Shape of one sample, without the batch."""


@dataclass(frozen=True)
class SampleSpec:
    """What one sample is at some place of a network: as it goes in, or at a cut between two layers.

    Attributes:
        shape: (C, H, W) of an image or feature map, (T, C) of a row of tokens, (T,) of a row of whole numbers.
        nonnegative: no entry is ever below 0, as behind a ReLU.
        causal: an entry of token t depends on tokens 0 .. t of the input alone.
        vocabulary: for whole numbers, how many there are: 0 .. vocabulary - 1; 0 for real ones.
    """

    shape: Shape
    nonnegative: bool = False
    causal: bool = False
    vocabulary: int = 0

    @property
    def unit(self) -> str:
        """What an evaluation counts: a label belongs to an image, or to a token."""
        return "tokens" if self.vocabulary else "images"

    def empty(self, batch_size: int, *, device: torch.device | str) -> Tensor:
        """A batch of this kind without meaningful contents."""
        dtype = torch.int64 if self.vocabulary else torch.float32
        return torch.zeros(batch_size, *self.shape, device=device, dtype=dtype)

    def random(self, batch_size: int, *, device: torch.device | str) -> Tensor:
        """A batch of this kind: standard normal entries, or whole numbers; from PyTorch's global generator."""
        if self.vocabulary:
            return torch.randint(self.vocabulary, (batch_size, *self.shape), device=device)
        entries = torch.randn(batch_size, *self.shape, device=device)
        return entries.relu_() if self.nonnegative else entries


def as_spec(given: SampleSpec | Shape) -> SampleSpec:
    """A plain shape stands for real numbers of any sign."""
    return given if isinstance(given, SampleSpec) else SampleSpec(tuple(given))


def shapes_after(makers: Iterable[Callable[[], nn.Module]], *, input_spec: SampleSpec | Shape) -> list[Shape]:
    """Shape of one sample after each layer of a chain.

    Args:
        makers: builders of the layers, in order.
        input_spec: one sample of the first layer's input, or its shape.

    Raises:
        ValueError: if a layer does not take what the one before it makes.
    """
    shapes: list[Shape] = []
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        sample = as_spec(input_spec).empty(2, device="meta")
        for index, make in enumerate(makers):
            shape = tuple(sample.shape[1:])
            try:
                sample = make().to("meta")(sample)
            except RuntimeError as error:
                raise ValueError(f"layer {index} does not take a sample of shape {shape}: {error}") from error
            shapes.append(tuple(sample.shape[1:]))
    return shapes
