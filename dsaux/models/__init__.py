"""The networks: lists of named layers that can be cut anywhere, and the AuxNet that feeds the stages.

`layer_names` needs no PyTorch: the configuration is checked with it. To add a family, write a module with `layers` as
in `dsaux.models.resnet`, put its names in `dsaux.models.naming` and enter it in `FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsaux.config_rules import ConfigError, show
from dsaux.models.naming import (
    TORCHVISION_BLOCKS,
    nearest_resnet,
    nearest_torchvision,
    nearest_wide_resnet,
    resnet_blocks,
    small_layer_names,
    torchvision_layer_names,
    wide_resnet_size,
)
from dsaux.models.reference import is_reference

if TYPE_CHECKING:
    from torch import nn

    from dsaux.config import ModelConfig
    from dsaux.models.custom import Whole
    from dsaux.models.shapes import SampleSpec, Shape

__all__ = ["FAMILIES", "Family", "Layer", "boundary_specs", "build_layer", "build_layers", "layer_names"]


@dataclass(frozen=True)
class Layer:
    """One item of a network's list, the smallest piece that a stage can hold.

    Attributes:
        name: unique in the network, such as "group2.block1".
        make: builds the module; draws its weights from PyTorch's global generator.
        nonnegative: its output is never below 0, as behind a ReLU; the AuxNet's segment for it ends in the same way.
        causal: entries of token t of its output depend on tokens 0 .. t of its input alone.
        whole: of a layer whose network can only be built whole, who builds it; see `build_layer`.
    """

    name: str
    make: Callable[[], nn.Module]
    nonnegative: bool = False
    causal: bool = False
    whole: Whole | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Family:
    """A kind of network, found by its name.

    Attributes:
        names: `names(model) -> layer names` in order, or None if the name is not one of this family. Needs no PyTorch.
        nearest: `nearest(model) -> a valid name` that a wrong one may stand for; None if it is nothing like these.
        allowed: the valid names in words.
        module: module with `layers(settings, num_classes=..., input_spec=...) -> list[Layer]`, `settings` being the
            block "dsaux.model".
        refused: options of the block "dsaux.model" that have no meaning here, each with the reason.
    """

    names: Callable[[str], list[str] | None]
    nearest: Callable[[str], str | None]
    allowed: str
    module: str
    refused: Mapping[str, str] = field(default_factory=dict)


def _resnet_names(model: str) -> list[str] | None:
    blocks = resnet_blocks(model)
    return None if blocks is None else small_layer_names(blocks)


def _wide_resnet_names(model: str) -> list[str] | None:
    size = wide_resnet_size(model)
    return None if size is None else small_layer_names(size[0])


_NO_DROPOUT = {"dropout": "its blocks have no place for it; the networks wrn<d>_<k> do"}
FAMILIES: Mapping[str, Family] = {
    "torchvision": Family(
        torchvision_layer_names,
        nearest_torchvision,
        f"one of torchvision's {', '.join(TORCHVISION_BLOCKS)}",
        "dsaux.models.torchvision_resnet",
        refused=_NO_DROPOUT,
    ),
    "wide_resnet": Family(
        _wide_resnet_names,
        nearest_wide_resnet,
        "a WideResNet wrn<d>_<k> with d = 6n+4 from 10 to 1000 and k from 1 to 99, such as wrn28_10",
        "dsaux.models.wide_resnet",
        refused={"zero_init": "its branches end in a convolution, not in a BatchNorm"},
    ),
    "resnet": Family(
        _resnet_names,
        nearest_resnet,
        "a CIFAR network resnet<d> or cifar_resnet<d> with d = 6n+2 from 8 to 1202, such as resnet20",
        "dsaux.models.resnet",
        refused=_NO_DROPOUT,
    ),
}
"""By kind. A name that two kinds could have belongs to the first: resnet50 is torchvision's, cifar_resnet50 is not."""


def layer_names(
    model: ModelConfig | str, *, num_classes: int | None = None, input_spec: SampleSpec | Shape | None = None
) -> list[str]:
    """Names of a network's layers, in order.

    Args:
        model: the block "dsaux.model", or its name alone.
        num_classes: as for `build_layers`; a user's own network alone needs it.
        input_spec: likewise.

    Raises:
        ConfigError: if there is no such network, with the nearest name, or an option has no meaning for it.
    """
    name = model if isinstance(model, str) else model.name
    if is_reference(name):
        if num_classes is None or input_spec is None:
            raise ValueError(f"{name} is a user's network: give num_classes and input_spec, which its function needs.")
        return [layer.name for layer in build_layers(model, num_classes=num_classes, input_spec=input_spec)]
    family, names = _find(name)
    if not isinstance(model, str):
        _check_options(model, family)
    return names


def build_layers(
    model: ModelConfig | str, *, num_classes: int, input_spec: SampleSpec | Shape = (3, 32, 32)
) -> list[Layer]:
    """The network as a list of named layers; no weights are made yet.

    Args:
        model: the block "dsaux.model", or its name alone, such as "resnet20".
        num_classes: width of the last layer's output.
        input_spec: one sample of the data, or its shape.

    Raises:
        ConfigError: if there is no such network, or an option has no meaning for it.
    """
    from dsaux.config import ModelConfig
    from dsaux.models.shapes import as_spec

    settings = ModelConfig(name=model) if isinstance(model, str) else model
    if is_reference(settings.name):
        from dsaux.models.custom import users_layers

        return users_layers(settings, num_classes=num_classes, input_spec=as_spec(input_spec))
    family, _ = _find(settings.name)
    _check_options(settings, family)
    layers: list[Layer] = importlib.import_module(family.module).layers(
        settings, num_classes=num_classes, input_spec=as_spec(input_spec)
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

    if layer.whole is not None:
        return layer.whole.take(index, seed=seed)
    with seeded(seed, "layer", index):
        return layer.make()


def boundary_specs(layers: list[Layer], *, input_spec: SampleSpec | Shape) -> list[SampleSpec]:
    """What one sample is after each layer; shapes are found by a dry run without data or memory.

    Args:
        layers: the network.
        input_spec: one sample of the data, or its shape.
    """
    from dsaux.models.shapes import SampleSpec, shapes_after

    shapes = shapes_after((layer.make for layer in layers), input_spec=input_spec)
    is_causal, specs = True, []
    for layer, shape in zip(layers, shapes, strict=True):
        is_causal = is_causal and layer.causal
        specs.append(SampleSpec(shape, nonnegative=layer.nonnegative, causal=is_causal))
    return specs


def _find(model: str) -> tuple[Family, list[str]]:
    for family in FAMILIES.values():
        names = family.names(model)
        if names is not None:
            return family, names
    allowed = "; or ".join(family.allowed for family in FAMILIES.values())
    found = (family.nearest(model) for family in FAMILIES.values())
    near = next((name for name in found if name is not None), "resnet20")
    raise ConfigError(
        f"dsaux.model.name is {show(model)}; it must be {allowed}. Did you mean {near}?"
        " A network of your own is written path/to/file.py:function."
    )


def _check_options(settings: ModelConfig, family: Family) -> None:
    for option, reason in family.refused.items():
        value = getattr(settings, option)
        if value:
            raise ConfigError(
                f"dsaux.model.{option} is {show(value)}, which {settings.name} cannot use: {reason}. Remove {option},"
                " or take another dsaux.model.name."
            )
