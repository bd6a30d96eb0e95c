"""What the AuxNet costs beside the network, at the cuts with equal multiply-accumulates."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from torch import Tensor, nn

from dsaux.aux_cost import aux_cost
from dsaux.models import boundary_specs, build_layers
from dsaux.models.auxnet import build_aux_net
from dsaux.models.cost import multiply_accumulates
from dsaux.models.shapes import SampleSpec

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import aux_cost as script  # noqa: E402 - a script, found beside the other benchmarks


class Chain(nn.Module):
    """The whole AuxNet as one module."""

    def __init__(self, specs: list[SampleSpec], segment: str) -> None:
        super().__init__()
        self.net = build_aux_net(specs, segment=segment)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[-1]


@pytest.mark.parametrize(
    ("model", "side", "stages", "segment", "width", "limit"),
    [
        ("resnet110", 32, 3, "light", 1.0, 0.05),
        ("wrn28_10", 32, 4, "bottleneck", 1.0, 0.05),
        ("resnet50", 224, 4, "bottleneck", 0.5, 0.08),
        ("resnet50", 224, 4, "bottleneck", 1.0, 0.08),
    ],
)
def test_the_auxnet_costs_a_small_part_of_the_network(
    model: str, side: int, stages: int, segment: str, width: float, limit: float
) -> None:
    image = (3, side, side)
    layers = build_layers(model, num_classes=10, input_spec=image)
    cost = aux_cost(layers, input_spec=image, num_stages=stages, segment=segment, width=width)
    print(f"{model}, K={stages}, {segment} {width:g}: {cost.aux_macs:,} of {cost.network_macs:,}")
    print(f"{100 * cost.macs_share:.2f} %, of parameters {100 * cost.parameters_share:.2f} %, bounds {cost.bounds}")
    assert 0 < cost.macs_share < limit
    assert len(cost.bounds) == stages + 1


@pytest.mark.parametrize("segment", ["light", "bottleneck"])
def test_costs_are_those_of_the_whole_network_and_the_whole_chain(segment: str) -> None:
    image = SampleSpec((3, 32, 32))
    layers = build_layers("wrn16_2", num_classes=10)
    cost = aux_cost(layers, input_spec=image, num_stages=3, segment=segment)
    network = nn.Sequential(*(layer.make() for layer in layers))
    assert cost.network_macs == multiply_accumulates(lambda: network, input_spec=image)
    assert cost.network_parameters == sum(parameter.numel() for parameter in network.parameters())
    after = boundary_specs(layers, input_spec=image)
    chain = Chain([image, *(after[cut - 1] for cut in cost.bounds[1:-1])], segment)
    assert cost.aux_macs == multiply_accumulates(lambda: chain, input_spec=image)
    assert cost.aux_parameters == sum(parameter.numel() for parameter in chain.parameters())


def test_the_cut_has_the_smallest_largest_stage() -> None:
    image = SampleSpec((3, 32, 32))
    layers = build_layers("resnet8", num_classes=10)
    after = boundary_specs(layers, input_spec=image)
    macs = [
        multiply_accumulates(layer.make, input_spec=spec) for layer, spec in zip(layers, [image, *after], strict=False)
    ]

    def largest(cut: int) -> int:
        aux = multiply_accumulates(lambda: Chain([image, after[cut - 1]], "light"), input_spec=image)
        return aux + max(sum(macs[:cut]), sum(macs[cut:]))  # with two stages both ranks evaluate the one segment

    cost = aux_cost(layers, input_spec=image, num_stages=2)
    assert largest(cost.bounds[1]) == min(largest(cut) for cut in range(1, len(layers)))


def test_one_stage_has_no_auxnet() -> None:
    cost = aux_cost(build_layers("resnet8", num_classes=10), input_spec=(3, 32, 32), num_stages=1)
    assert (cost.bounds, cost.aux_macs, cost.aux_parameters) == ((0, 5), 0, 0)


def test_the_command_prints_a_line_for_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "resnet8", "--stages", "2", "--segment", "light", "bottleneck", "--width", "0.5"]
    monkeypatch.setattr(sys, "argv", ["aux_cost.py", *arguments, "--markdown"])
    assert script.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 4
    assert "| light, 1, 0.5 " in lines[2]
    assert "| bottleneck, 1, 0.5 " in lines[3]
    monkeypatch.setattr(sys, "argv", ["aux_cost.py", "--model", "resnet9"])
    assert script.main() == 2
    assert "Did you mean resnet8?" in capsys.readouterr().err


def test_the_default_list_has_no_line_twice() -> None:
    assert not any(one == other for one, other in itertools.combinations(script.DEFAULT, 2))
