"""Users' own networks: a function in "dsaux.model.name" that gives an nn.Sequential or a list of layers.

`dsaux.models.build_layers` comes here for a name with a colon. What the function gives is checked as a whole, on the
meta device, before any process group exists (`dsaux.launch_check`): see docs/your_model.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dsaux.config import ModelConfig
from dsaux.config_rules import ConfigError, show
from dsaux.models import Layer
from dsaux.models.reference import in_one_line, load_function
from dsaux.models.seeding import seeded
from dsaux.models.shapes import SampleSpec

KEY = "dsaux.model.name"
_NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid)


class Whole:
    """A network that its function can only build whole; its children are handed out one by one.

    Args:
        build: builds the network, with weights from PyTorch's global generator.
        children: the network on the meta device, for dry runs.
    """

    def __init__(self, build: Callable[[], nn.Sequential], children: Sequence[nn.Module]) -> None:
        self._build, self._meta = build, list(children)
        self._seed: int | None = None
        self._built: dict[int, nn.Module] = {}

    def make(self, index: int) -> nn.Module:
        """One child with weights from the global generator; on the meta device without any."""
        return self._meta[index] if torch.get_default_device().type == "meta" else self._build()[index]

    def take(self, index: int, *, seed: int) -> nn.Module:
        """One child of the network that a seed makes: the same child, whichever are taken and in whatever order.

        The others are kept until :meth:`release`: a stage takes several. The taken one is the caller's alone.
        """
        if self._seed != seed or index not in self._built:
            with seeded(seed, "network", 0):
                self._built = dict(enumerate(self._build()))
            self._seed = seed
        return self._built.pop(index)

    def release(self) -> None:
        """Free the children that nobody took."""
        self._built = {}


def users_layers(settings: ModelConfig, *, num_classes: int, input_spec: SampleSpec) -> list[Layer]:
    """The layers of a user's network, checked in a dry run without weights.

    Args:
        settings: the block "dsaux.model".
        num_classes: number of class scores.
        input_spec: one sample of the data.

    Raises:
        ConfigError: for the first thing that is wrong with the function or with what it gives.
    """
    function = load_function(settings.name, key=KEY)
    arguments = dict(settings.args or {})
    for name in ("num_classes", "input_spec"):
        if name in arguments:
            raise ConfigError(f"dsaux.model.args.{name} is given by dsaux itself. Remove it.")
    call = functools.partial(function, num_classes=num_classes, input_spec=input_spec, **arguments)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        try:
            given = call()
        except Exception as error:
            raise ConfigError(f"{KEY} {show(settings.name)} failed: {in_one_line(error)}. Mend it.") from error
        if isinstance(given, nn.Sequential):
            layers, modules = _from_sequential(given, call)
        elif isinstance(given, (list, tuple)):
            layers, modules = _from_list(given, name=settings.name)
        else:
            raise ConfigError(
                f"{KEY} {show(settings.name)} gave a {type(given).__name__}; it must give an nn.Sequential, or a list "
                "of dsaux.models.Layer or of (name, function) pairs. Change what it returns."
            )
    _check_names([layer.name for layer in layers], name=settings.name)
    _check_weights(layers, modules, name=settings.name)
    _check_chain(layers, modules, settings=settings, input_spec=input_spec, num_classes=num_classes)
    return [
        replace(
            layer,
            nonnegative=layer.nonnegative or is_nonnegative(module),
            causal=layer.causal or getattr(module, "causal", None) is True,
        )
        for layer, module in zip(layers, modules, strict=True)
    ]


def is_nonnegative(module: nn.Module) -> bool:
    """Whether a module's output is never below 0: it says so, or is an nn.Sequential that ends in such a function.

    The last child of another module need not be the last to be called, so nothing is concluded from it.
    """
    stated = getattr(module, "nonnegative", None)
    if isinstance(stated, bool):
        return stated
    if isinstance(module, nn.Sequential) and len(module):
        return is_nonnegative(module[-1])
    return isinstance(module, _NONNEGATIVE)


def _from_sequential(given: nn.Sequential, call: Callable[[], Any]) -> tuple[list[Layer], list[nn.Module]]:
    modules = list(given)
    whole = Whole(call, modules)
    names = list(given._modules)  # named_children() leaves out a module that occurs twice
    layers = [Layer(name, functools.partial(whole.make, index), whole=whole) for index, name in enumerate(names)]
    return layers, modules


def _from_list(given: Sequence[Any], *, name: str) -> tuple[list[Layer], list[nn.Module]]:
    layers, modules = [], []
    for place, entry in enumerate(given):
        is_pair = isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)
        layer = Layer(entry[0], entry[1]) if is_pair else entry
        if not isinstance(layer, Layer) or not callable(layer.make) or isinstance(layer.make, nn.Module):
            raise ConfigError(
                f"{KEY} {show(name)}: entry {place} of its list is a {type(entry).__name__}; it must be a "
                "dsaux.models.Layer or a pair of a name and a function without arguments that makes the module. "
                "Modules that are made already go into an nn.Sequential."
            )
        try:
            module = layer.make()
        except Exception as error:
            raise ConfigError(
                f"{KEY} {show(name)}: its layer {show(layer.name)} cannot be made: {in_one_line(error)}. Mend it."
            ) from error
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"{KEY} {show(name)}: the function of its layer {show(layer.name)} gave a {type(module).__name__}; it "
                "must give an nn.Module. Change it."
            )
        layers.append(layer)
        modules.append(module)
    return layers, modules


def _check_names(names: Sequence[str], *, name: str) -> None:
    if not names:
        raise ConfigError(f"{KEY} {show(name)} gave no layers. Let it give two or more.")
    for place, layer in enumerate(names):
        if not all(layer.split(".")):
            raise ConfigError(f"{KEY} {show(name)}: layer {place} is named {show(layer)}. Give it a name.")
        if layer in names[:place]:
            raise ConfigError(f"{KEY} {show(name)}: two layers are named {show(layer)}. Rename one.")
        if any(other.startswith(f"{layer}.") for other in names):
            raise ConfigError(
                f"{KEY} {show(name)}: layer {show(layer)} is named like a group of other layers. Rename it."
            )


def _check_weights(layers: Sequence[Layer], modules: Sequence[nn.Module], *, name: str) -> None:
    """Refuses weights that two layers share, as they may lie on different ranks, and weights that are yet to be."""
    owners: dict[int, str] = {}
    for layer, module in zip(layers, modules, strict=True):
        if any(is_lazy(weight) for weight in module.parameters()):
            raise ConfigError(
                f"{KEY} {show(name)}: layer {show(layer.name)} has a lazy module, whose weights are made at its first "
                "call; the optimizer needs them before. Give its sizes."
            )
        for part in {id(part): part for part in (*module.modules(), *module.parameters())}.values():
            owner = owners.setdefault(id(part), layer.name)
            if owner != layer.name:
                raise ConfigError(
                    f"{KEY} {show(name)}: layers {show(owner)} and {show(layer.name)} share weights or a module. Two "
                    "stages may hold them, on two ranks: give each layer its own."
                )


def _check_chain(
    layers: Sequence[Layer],
    modules: Sequence[nn.Module],
    *,
    settings: ModelConfig,
    input_spec: SampleSpec,
    num_classes: int,
) -> None:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        sample: Any = input_spec.empty(2, device="meta")
        for layer, module in zip(layers, modules, strict=True):
            shape = tuple(sample.shape[1:])
            try:
                sample = module.to("meta")(sample)
            except Exception as error:
                raise ConfigError(
                    f"{KEY} {show(settings.name)}: layer {show(layer.name)} does not take what comes before it, a "
                    f"sample of shape {shape}: {in_one_line(error)}. Mend it."
                ) from error
            if not isinstance(sample, torch.Tensor) or len(sample) != 2:
                raise ConfigError(
                    f"{KEY} {show(settings.name)}: layer {show(layer.name)} gives no tensor whose first axis is the "
                    "batch; every layer must. Mend it."
                )
    wanted = (*input_spec.shape, num_classes) if input_spec.vocabulary else (num_classes,)
    if tuple(sample.shape[1:]) != wanted:
        raise ConfigError(
            f"{KEY} {show(settings.name)}: the last layer, {show(layers[-1].name)}, gives a sample of shape "
            f"{tuple(sample.shape[1:])}, but this data set needs scores of shape {wanted}. Use num_classes, which the "
            "function is called with."
        )
