"""WideResNets: the published sizes, and the same numbers as a network that is written down here as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux import ConfigError
from dsaux.config import ModelConfig
from dsaux.models import boundary_specs, build_layers, layer_names
from dsaux.models.network import build_network

# Zagoruyko and Komodakis, arXiv:1605.07146, table 4 (CIFAR-10), in millions.
PUBLISHED_PARAMETERS = {
    "wrn40_1": 0.6,
    "wrn40_2": 2.2,
    "wrn40_4": 8.9,
    "wrn16_4": 2.7,
    "wrn16_8": 11.0,
    "wrn28_10": 36.5,
}


@pytest.mark.parametrize("model", PUBLISHED_PARAMETERS)
def test_number_of_parameters_is_the_published_one(model: str) -> None:
    with torch.device("meta"):
        network = build_network(model, num_classes=10)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED_PARAMETERS[model], abs=0.05)  # published to one decimal


@pytest.mark.parametrize(("model", "depth"), [("wrn10_1", 10), ("wrn28_10", 28), ("wrn40_2", 40)])
def test_depth_counts_3x3_convolutions_projections_and_the_linear_layer(model: str, depth: int) -> None:
    with torch.device("meta"):
        network = build_network(model, num_classes=10)
    kinds = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    projections = [m for m in kinds if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(projections) == (2 if model.endswith("_1") else 3)
    # The paper's d = 6n + 4: the stem, 6n convolutions and three projections, k = 1 or not; no linear layer.
    assert len(kinds) - len(projections) - 1 + 3 == depth


def test_layers_and_what_lies_between_them() -> None:
    specs = boundary_specs(build_layers("wrn16_4", num_classes=7), input_spec=(3, 32, 32))
    assert layer_names("wrn16_4") == [
        "stem", "group1.block1", "group1.block2", "group2.block1", "group2.block2", "group3.block1", "group3.block2",
        "head",
    ]  # fmt: skip
    wide = [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2
    assert [spec.shape for spec in specs] == [(16, 32, 32), *wide, (7,)]
    assert not any(spec.nonnegative for spec in specs)


def test_block_outputs_have_both_signs() -> None:
    network = build_network("wrn10_1", num_classes=4)
    x = torch.randn(4, 3, 16, 16)
    for name in network.layer_names:
        x = network.get_submodule(name)(x)
        assert x.min() < 0 < x.max()


class Whole(nn.Module):
    """wrn16_2 as one flat list of operations, from the paper's table 1 and figure 1 (a), with pre-activation."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.convs, self.norms = nn.ParameterList(), nn.ModuleList()
        self.first = nn.Parameter(torch.empty(16, 3, 3, 3))
        self.shortcuts = nn.ParameterList()
        width = 16
        for out in (32, 64, 128):
            for _ in range(2):
                self.norms += [nn.BatchNorm2d(width), nn.BatchNorm2d(out)]
                self.convs += [nn.Parameter(torch.empty(out, width, 3, 3)), nn.Parameter(torch.empty(out, out, 3, 3))]
                if width != out:
                    self.shortcuts.append(nn.Parameter(torch.empty(out, width, 1, 1)))
                width = out
        self.last = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.first, padding=1)
        for place in range(6):
            is_first, stride = place % 2 == 0, 2 if place in (2, 4) else 1
            one, two = self.norms[2 * place], self.norms[2 * place + 1]
            active = torch.relu(one(x))
            y = F.conv2d(active, self.convs[2 * place], stride=stride, padding=1)
            y = F.conv2d(torch.relu(two(y)), self.convs[2 * place + 1], padding=1)
            x = y + (F.conv2d(active, self.shortcuts[place // 2], stride=stride) if is_first else x)
        return self.linear(F.adaptive_avg_pool2d(torch.relu(self.last(x)), 1).flatten(1))


def paired(network: nn.Module, whole: Whole) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The same parameter of both, in the whole network's order of use."""
    pairs = [(network.get_parameter("stem.0.weight"), whole.first)]
    names = [f"group{group}.block{block}" for group in (1, 2, 3) for block in (1, 2)]
    for place, name in enumerate(names):
        for part in (0, 1):
            pairs.append((network.get_parameter(f"{name}.conv{part + 1}.weight"), whole.convs[2 * place + part]))
            norm = whole.norms[2 * place + part]
            pairs += [(network.get_parameter(f"{name}.bn{part + 1}.{kind}"), getattr(norm, kind)) for kind in KINDS]
        if place % 2 == 0:
            pairs.append((network.get_parameter(f"{name}.projection.weight"), whole.shortcuts[place // 2]))
    pairs += [(network.get_parameter(f"head.bn.{kind}"), getattr(whole.last, kind)) for kind in KINDS]
    pairs += [(network.get_parameter(f"head.fc.{kind}"), getattr(whole.linear, kind)) for kind in KINDS]
    return pairs


KINDS = ("weight", "bias")


def test_output_and_gradients_are_those_of_the_network_written_as_a_whole() -> None:
    torch.manual_seed(0)
    network, whole = build_network("wrn16_2", num_classes=5).double(), Whole(5).double()
    pairs = paired(network, whole)
    assert len({id(one) for one, _ in pairs}) == len(list(network.parameters())) == len(list(whole.parameters()))
    for one, other in pairs:
        if one.dim() == 1:
            nn.init.uniform_(one, 0.5, 1.5)  # BatchNorm's start, 1 and 0, would hide an exchange
        other.data.copy_(one.data)
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    found, expected = network(images), whole(images)
    # float64: another order of sums moves the last digits only
    assert float((found - expected).detach().abs().max()) <= 1e-10 * float(expected.detach().abs().max())
    F.cross_entropy(found, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for one, other in pairs:
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).abs().max()) <= 1e-10 * float(other.grad.abs().max())


def test_dropout_acts_in_training_alone_and_adds_no_tensor() -> None:
    plain = build_network("wrn10_1", num_classes=4)
    network = build_network(ModelConfig(name="wrn10_1", dropout=0.5), num_classes=4)
    network.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(network(images), network(images))
        assert torch.equal(plain(images), plain(images))
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(images), plain.eval()(images))


def test_zero_init_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"dsaux\.model\.zero_init is true, which wrn16_4 cannot use: its branches end"
    ):
        layer_names(ModelConfig(name="wrn16_4", zero_init=True))
