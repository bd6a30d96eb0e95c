"""A small float64 network for the numerics tests, its configuration, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsaux.models import Layer, boundary_specs
from dsaux.models.auxnet import AuxNet, build_aux_net
from dsaux.models.local_heads import build_local_heads

INPUT_SHAPE = (3, 8, 8)
NUM_CLASSES = 5


def small_layers() -> list[Layer]:
    """Six layers: five convolutions (the third halves the resolution) with BatchNorm and ReLU, and a head."""
    widths = [(3, 6, 1), (6, 6, 1), (6, 8, 2), (8, 8, 1), (8, 8, 1)]
    layers = [
        Layer(f"conv{index}", lambda c_in=c_in, c_out=c_out, stride=stride: _convolution(c_in, c_out, stride))
        for index, (c_in, c_out, stride) in enumerate(widths)
    ]
    return [*layers, Layer("head", _head)]


def small_aux_net(bounds: list[int], *, seed: int = 0) -> AuxNet:
    """The AuxNet for some cut of :func:`small_layers`."""
    after = boundary_specs(small_layers(), input_spec=INPUT_SHAPE)
    return build_aux_net([INPUT_SHAPE, *(after[bound - 1].shape for bound in bounds[1:-1])], seed=seed)


def small_heads(bounds: list[int], *, seed: int = 0) -> list[nn.Module]:
    """The local heads for some cut of :func:`small_layers`."""
    after = boundary_specs(small_layers(), input_spec=INPUT_SHAPE)
    return build_local_heads([after[bound - 1] for bound in bounds[1:-1]], scores=after[-1], seed=seed)


def small_config(*, stages: int, batch: int, accumulation: int, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed document with its dsaux block; `changes` replace top-level keys, "dsaux" is merged by block."""
    document: dict[str, Any] = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {
            "type": "SGD",
            "params": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        },
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "dsaux": {"pipeline": {"stages": stages}, "data": {"loader": "torch"}},
    }
    for block, values in changes.pop("dsaux", {}).items():
        document["dsaux"].setdefault(block, {}).update(values)
    document.update(changes)
    return document


def batches(count: int, size: int, *, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of `size` random images and labels, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *INPUT_SHAPE, generator=generator, dtype=torch.float64),
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def _convolution(c_in: int, c_out: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())


def _head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, NUM_CLASSES))
