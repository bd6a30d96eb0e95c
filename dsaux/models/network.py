"""The plain network: the layers of a model one after the other in one module, without pipeline and AuxNet.

`dsaux.export` and `dsaux.predict` build it. The stages of a run hold the same layers, so its weights are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsaux.config import ModelConfig
from dsaux.models import FAMILIES, Layer, build_layers
from dsaux.models.shapes import SampleSpec, Shape


class Network(nn.Module):
    """Layers in a row, nested by their dotted names: "group2.block1" is the child block1 of the child group2.

    Args:
        layers: at least one; the weights come from PyTorch's global generator.

    Raises:
        ValueError: if two layers have the same name, or one is named like a group of others.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layer_names = [layer.name for layer in layers]
        for index, layer in enumerate(layers):
            _attach(self, layer, index)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to class scores (B, classes); rows of text (B, T) to (B, T, classes)."""
        x = images
        for name in self.layer_names:
            x = self.get_submodule(name)(x)
        return x


class Group(nn.Module):
    """Holds the layers whose names begin alike; is never called."""


def build_network(
    model: ModelConfig | str, *, num_classes: int, input_spec: SampleSpec | Shape = (3, 32, 32)
) -> Network:
    """The network with random weights, in training mode.

    Args:
        model: the block "dsaux.model", or its name alone, such as "resnet20".
        num_classes: width of the last layer's output.
        input_spec: one sample of the data, or its shape.

    Raises:
        ConfigError: if there is no such model.
    """
    return Network(build_layers(model, num_classes=num_classes, input_spec=input_spec))


def _torchvision_key(key: str) -> str:
    return key.removeprefix("stem.").removeprefix("head.")


PUBLIC_KEYS: Mapping[str, Callable[[str], str]] = {"torchvision": _torchvision_key}
"""Family in `dsaux.models.FAMILIES` -> function from a key of `Network.state_dict()` to torchvision's or timm's own.

A family whose architecture is theirs enters its function here, which must be one-to-one; the others keep their keys.
The CIFAR ResNets and the WideResNets do: neither library has them.
"""
_COUNTER = ".num_batches_tracked"


def public_key(model: str, key: str) -> str:
    """The name under which a written file holds the tensor `key` of a network.

    Args:
        model: name of the model.
        key: as in `Network.state_dict()`.
    """
    for name, family in FAMILIES.items():
        if family.names(model) is not None:
            return PUBLIC_KEYS[name](key) if name in PUBLIC_KEYS else key
    return key


def public_state_dict(network: Network, model: str) -> dict[str, Tensor]:
    """Weights and buffers under the names that other libraries use for this architecture.

    Args:
        network: the network.
        model: its name, such as "resnet50": `torchvision.models.resnet50` loads what comes out.
    """
    state = {public_key(model, key): tensor for key, tensor in network.state_dict().items()}
    assert len(state) == len(network.state_dict()), "a family's renaming is one-to-one"
    return state


def load_public_state_dict(network: Network, state: Mapping[str, Tensor], *, model: str) -> None:
    """Load what `public_state_dict` gives, or for torchvision's networks a state dict of torchvision's.

    All tensors must be there and no other, except that BatchNorm's counters `num_batches_tracked`, which old files
    lack, become 0. The network is not changed where an error is raised.

    Args:
        network: of this model.
        state: tensors by public name.
        model: the network's name.

    Raises:
        ValueError: names the first tensor that is missing, of another network or of another shape.
    """
    own = network.state_dict()
    keys = {public_key(model, key): key for key in own}
    needed = {key for key in keys if key in state or not key.endswith(_COUNTER)}
    if set(state) != needed:
        odd = sorted(set(state) ^ needed)[0]
        raise ValueError(f'the tensor "{odd}" is {"missing" if odd in keys else "no part"} of {model}')
    for key, tensor in state.items():
        expected = own[keys[key]].shape
        if tensor.shape != expected:
            raise ValueError(
                f'the tensor "{key}" has the wrong shape for {model} with these classes and channels: '
                f"{tuple(tensor.shape)} in place of {tuple(expected)}"
            )
    counters = {keys[key]: torch.zeros_like(own[keys[key]]) for key in keys if key not in state}
    network.load_state_dict({**counters, **{keys[key]: tensor for key, tensor in state.items()}})


def _attach(root: nn.Module, layer: Layer, index: int) -> None:
    *groups, last = layer.name.split(".")
    parent = root
    for group in groups:
        children = dict(parent.named_children())
        if group not in children:
            children[group] = Group()
            parent.add_module(group, children[group])
        parent = children[group]
        if not isinstance(parent, Group):
            raise ValueError(
                f'layer "{layer.name}" is named as if it were part of layer "{group}"; give it another name.'
            )
    if last in dict(parent.named_children()):
        raise ValueError(f'two layers, or a layer and a group of layers, are named "{layer.name}"; rename one.')
    # A network that can only be built whole is built once for all layers; its weights are replaced in any case.
    module = layer.make() if layer.whole is None else layer.whole.take(index, seed=torch.initial_seed())
    parent.add_module(last, module)
