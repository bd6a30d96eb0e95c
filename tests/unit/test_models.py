"""Residual networks as lists of layers: names, shapes, sizes, weights by seed and place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsaux.config import ConfigError, ModelConfig
from dsaux.models import boundary_specs, build_layer, build_layers, layer_names
from dsaux.models.cost import multiply_accumulates
from dsaux.models.shapes import shapes_after

# He et al., arXiv:1512.03385, table 6: parameters of the CIFAR-10 networks, in millions.
PUBLISHED_PARAMETERS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}


@pytest.mark.parametrize("model", PUBLISHED_PARAMETERS)
def test_number_of_parameters_is_the_published_one(model: str) -> None:
    with torch.device("meta"):
        modules = [layer.make() for layer in build_layers(model, num_classes=10)]
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED_PARAMETERS[model], abs=0.03 if model == "resnet110" else 0.006)


@pytest.mark.parametrize(
    ("model", "depth"), [("resnet8", 8), ("resnet20", 20), ("resnet110", 110), ("resnet1202", 1202)]
)
def test_depth_counts_convolutions_and_the_linear_layer(model: str, depth: int) -> None:
    with torch.device("meta"):
        modules = [layer.make() for layer in build_layers(model, num_classes=10)]
    weighted = [m for module in modules for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth
    assert len(layer_names(model)) == len(modules) == (depth - 2) // 2 + 2


def test_names_are_unique_and_in_the_order_of_the_layers() -> None:
    names = layer_names("resnet20")
    assert names[0] == "stem"
    assert names[4] == "group2.block1"
    assert names[-1] == "head"
    assert len(set(names)) == len(names)
    assert [layer.name for layer in build_layers("resnet20", num_classes=18)] == names


def test_shapes_after_each_layer() -> None:
    specs = boundary_specs(build_layers("resnet14", num_classes=7), input_spec=(3, 32, 32))
    assert [spec.nonnegative for spec in specs] == [True] * 7 + [False]
    assert [spec.shape for spec in specs] == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2 + [(7,)]


def test_a_layer_that_does_not_fit_the_one_before_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 1 does not take a sample of shape \(8,\)"):
        shapes_after([lambda: nn.Linear(4, 8), lambda: nn.Linear(9, 2)], input_spec=(4,))


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("resnet21", "resnet20"),
        ("resnet51", "resnet50"),
        ("resnet100", "resnet101"),
        ("ResNet50", "resnet50"),
        ("resnte20", "resnet20"),
        ("resnet5000", "resnet1202"),
        ("cifar_resnet18", "cifar_resnet20"),
        ("cifar-resnet50", "cifar_resnet50"),
        ("resnext50", "resnext50_32x4d"),
        ("resnext101", "resnext101_32x8d"),
        ("wide_resnet50", "wide_resnet50_2"),
        ("wrn28-10", "wrn28_10"),
        ("wideresnet28_10", "wrn28_10"),
        ("WRN-27-10", "wrn28_10"),
        ("wrn28_100", "wrn28_99"),
        ("wrn5_2", "wrn10_2"),
        ("wrn", "wrn28_10"),
        ("vgg", "resnet20"),
    ],
)
def test_an_unknown_network_is_refused_with_all_there_are_and_the_nearest_one(wrong: str, near: str) -> None:
    layer_names(near)
    kinds = r"resnet18, .*resnext50_32x4d, .*wrn<d>_<k> with d = 6n\+4 .*resnet<d> or cifar_resnet<d> with d = 6n\+2"
    with pytest.raises(ConfigError, match=rf'dsaux.model.name is "{wrong}".*{kinds}.*Did you mean {near}\?'):
        layer_names(wrong)


@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_a_name_that_two_kinds_could_have_is_torchvisions(name: str) -> None:
    assert layer_names(name)[1] == "layer1.0"
    assert layer_names(f"cifar_{name}")[1] == "group1.block1"


@pytest.mark.parametrize("model", ["resnet8", "resnet20", "resnet110"])
def test_cifar_networks_have_the_longer_name_too(model: str) -> None:
    assert layer_names(f"cifar_{model}") == layer_names(model)
    with torch.device("meta"):
        one, other = (
            [layer.make() for layer in build_layers(name, num_classes=10)] for name in (model, f"cifar_{model}")
        )
    assert repr(one) == repr(other)


@pytest.mark.parametrize(
    "name", ["cifar_resnet18", "cifar_wrn28_10", "wrn28_0", "wrn028_1", "resnet020", "wrn28_100", "Resnet20"]
)
def test_names_that_look_alike_are_none(name: str) -> None:
    with pytest.raises(ConfigError):
        layer_names(name)


def test_zero_init_starts_a_cifar_block_with_its_shortcut_alone() -> None:
    settings = ModelConfig(name="resnet8", zero_init=True)
    blocks = [layer.make() for layer in build_layers(settings, num_classes=4)[1:-1]]
    assert [bool(block.bn2.weight.any()) for block in blocks] == [False] * 3
    assert all(block.bn1.weight.eq(1).all() for block in blocks)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(blocks[0](x), x)


def test_dropout_is_refused_where_it_has_no_place() -> None:
    with pytest.raises(ConfigError, match=r"dsaux\.model\.dropout is 0\.1, which resnet8 cannot use: .*wrn"):
        build_layers(ModelConfig(name="resnet8", dropout=0.1), num_classes=4)


def test_weights_depend_on_seed_and_place_alone() -> None:
    layers = build_layers("resnet8", num_classes=4)
    one = build_layer(layers[1], 1, seed=5)
    torch.randn(100)
    again, elsewhere, other_seed = (
        build_layer(layers[1], 1, seed=5),
        build_layer(layers[1], 2, seed=5),
        build_layer(layers[1], 1, seed=6),
    )
    assert torch.equal(one.conv1.weight, again.conv1.weight)
    assert not torch.equal(one.conv1.weight, elsewhere.conv1.weight)
    assert not torch.equal(one.conv1.weight, other_seed.conv1.weight)


def test_building_a_layer_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_layer(build_layers("resnet8", num_classes=4)[0], 0, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_a_block_that_halves_the_resolution_keeps_its_input_in_the_shortcut() -> None:
    block = build_layers("resnet8", num_classes=4)[2].make().eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x)[:, 8:24], x[:, :, ::2, ::2])
    assert torch.equal(block(x)[:, :8], torch.zeros(2, 8, 4, 4))


def test_multiply_accumulates_of_a_convolution() -> None:
    count = multiply_accumulates(lambda: nn.Conv2d(3, 16, 3, padding=1), input_spec=(3, 32, 32))
    assert count == 3 * 16 * 9 * 32 * 32
