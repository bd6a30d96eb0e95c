"""The plain network: the same layers as the stages, under nested names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsaux.models import Layer
from dsaux.models.network import Network, build_network, public_key
from tests.saved_run import chain


@pytest.mark.parametrize("model", ["resnet8", "resnet20"])
def test_the_network_is_its_layers_one_after_the_other(model: str) -> None:
    network = build_network(model, num_classes=7, input_spec=(1, 32, 32)).eval()
    layers = [network.get_submodule(name) for name in network.layer_names]
    images = torch.randn(3, 1, 16, 16)
    scores = network(images)
    assert scores.shape == (3, 7)
    assert torch.equal(scores, chain(layers, images))


def test_keys_are_layer_name_and_key_in_the_layer() -> None:
    keys = list(build_network("resnet8", num_classes=7).state_dict())
    assert keys[0] == "stem.0.weight"
    assert "group1.block1.conv1.weight" in keys
    assert "group3.block1.bn2.running_var" in keys
    assert keys[-2:] == ["head.fc.weight", "head.fc.bias"]
    assert [public_key("resnet8", key) for key in keys] == keys


@pytest.mark.parametrize("names", [("a", "a"), ("a.b", "a"), ("a", "a.b")])
def test_names_that_would_hide_each_other_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="name"):
        Network([Layer(name, lambda: nn.Linear(2, 2)) for name in names])
