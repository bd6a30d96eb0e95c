"""The networks: lists of named layers that can be cut anywhere, and the AuxNet that feeds the stages.

`layer_names` needs no PyTorch: the configuration is checked with it. To add a family, write a module with `names` and
`layers` as in `dsaux.models.resnet` and enter it in `FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsaux.config_rules import ConfigError, show
from dsaux.models.naming import nearest_resnet, resnet_blocks, resnet_layer_names

if TYPE_CHECKING:
    from torch import nn

    from dsaux.models.shapes import Shape

__all__ = ["FAMILIES", "Family", "Layer", "boundary_shapes", "build_layer", "build_layers", "layer_names"]


@dataclass(frozen=True)
class Layer:
    """One item of a network's list, the smallest piece that a stage can hold.

    Attributes:
        name: unique in the network, such as "group2.block1".
        make: builds the module; draws its weights from PyTorch's global generator.
    """

    name: str
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Family:
    """A kind of network, found by the beginning of its name.

    Attributes:
        names: `names(model) -> layer names` in order, or None if the name is not one of this family. Needs no PyTorch.
        nearest: `nearest(model) -> a valid name` that is close to it.
        allowed: the valid names in words.
        module: module with `layers(model, num_classes=..., in_channels=...) -> list[Layer]`.
    """

    names: Callable[[str], list[str] | None]
    nearest: Callable[[str], str]
    allowed: str
    module: str


def _resnet_names(model: str) -> list[str] | None:
    blocks = resnet_blocks(model)
    return None if blocks is None else resnet_layer_names(blocks)


FAMILIES: Mapping[str, Family] = {
    "resnet": Family(
        _resnet_names,
        nearest_resnet,
        "resnet followed by a depth of 6n+2, from resnet8 to resnet1202",
        "dsaux.models.resnet",
    ),
}


def layer_names(model: str) -> list[str]:
    """Names of a network's layers, in order.

    Raises:
        ConfigError: if there is no such network, with the nearest name.
    """
    _, names = _find(model)
    return names


def build_layers(model: str, *, num_classes: int, in_channels: int = 3) -> list[Layer]:
    """The network as a list of named layers; no weights are made yet.

    Args:
        model: such as "resnet20".
        num_classes: width of the last layer's output.
        in_channels: channels of the images.

    Raises:
        ConfigError: if there is no such network.
    """
    family, _ = _find(model)
    layers: list[Layer] = importlib.import_module(family.module).layers(
        model, num_classes=num_classes, in_channels=in_channels
    )
    return layers


def build_layer(layer: Layer, index: int, *, seed: int) -> nn.Module:
    """Build one layer with weights that depend on the seed and its place in the network alone.

    So a stage builds its own layers only, and the network starts from the same weights however it is cut.

    Args:
        layer: the layer.
        index: its place in the network's list.
        seed: the run's seed.
    """
    from dsaux.models.seeding import seeded

    with seeded(seed, "layer", index):
        return layer.make()


def boundary_shapes(layers: list[Layer], *, input_shape: Shape) -> list[Shape]:
    """Shape of one sample after each layer, found by a dry run without data or memory.

    Args:
        layers: the network.
        input_shape: (channels, height, width) of one sample.
    """
    from dsaux.models.shapes import shapes_after

    return shapes_after((layer.make for layer in layers), input_shape=input_shape)


def _find(model: str) -> tuple[Family, list[str]]:
    for family in FAMILIES.values():
        names = family.names(model)
        if names is not None:
            return family, names
    allowed = "; ".join(family.allowed for family in FAMILIES.values())
    near = next(iter(FAMILIES.values())).nearest(model)
    raise ConfigError(f"dsaux.model.name is {show(model)}; it must be {allowed}. Did you mean {near}?")
