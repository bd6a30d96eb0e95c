"""The plain network: the layers of a model one after the other in one module, without pipeline and AuxNet.

`dsaux.export` and `dsaux.predict` build it. The stages of a run hold the same layers, so its weights are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from dsaux.models import FAMILIES, Layer, build_layers


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
        for layer in layers:
            _attach(self, layer)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to class scores (B, classes)."""
        x = images
        for name in self.layer_names:
            x = self.get_submodule(name)(x)
        return x


class Group(nn.Module):
    """Holds the layers whose names begin alike; is never called."""


def build_network(name: str, *, num_classes: int, in_channels: int = 3) -> Network:
    """The network with random weights, in training mode.

    Args:
        name: of the model, such as "resnet20".
        num_classes: width of the last layer's output.
        in_channels: channels of the images.

    Raises:
        ConfigError: if there is no such model.
    """
    return Network(build_layers(name, num_classes=num_classes, in_channels=in_channels))


PUBLIC_KEYS: Mapping[str, Callable[[str], str]] = {}
"""Family in `dsaux.models.FAMILIES` -> function from a key of `Network.state_dict()` to torchvision's or timm's own.

A family whose architecture is theirs enters its function here, which must be one-to-one; the others keep their keys.
The CIFAR ResNets do: neither library has them (torchvision's resnet50 is another network than resnet50 here).
"""


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


def _attach(root: nn.Module, layer: Layer) -> None:
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
    parent.add_module(last, layer.make())
