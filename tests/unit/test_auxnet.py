"""The AuxNet: shapes for every cut, the chain, seeds, cost."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsaux.models import boundary_shapes, build_layers
from dsaux.models.auxnet import SEGMENTS, build_aux_net
from dsaux.models.shapes import multiply_accumulates

IMAGE = (3, 32, 32)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("cuts", list(itertools.combinations(range(1, 8), 2)))
def test_every_cut_gets_segments_of_the_boundaries_shapes(segment: str, cuts: tuple[int, int]) -> None:
    after = boundary_shapes(build_layers("resnet14", num_classes=5), input_shape=IMAGE)
    shapes = [IMAGE, *(after[cut - 1] for cut in cuts)]
    variables = build_aux_net(shapes, segment=segment)(torch.randn(2, *IMAGE))
    assert [tuple(variable.shape[1:]) for variable in variables] == shapes[1:]


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (9, 6)])
@pytest.mark.parametrize("segment", SEGMENTS)
def test_odd_resolutions_work(segment: str, size: tuple[int, int]) -> None:
    (variable,) = build_aux_net([(3, 15, 13), (4, *size)], segment=segment)(torch.randn(3, 3, 15, 13))
    assert variable.shape == (3, 4, *size)


def test_each_variable_is_made_from_the_one_before() -> None:
    net = build_aux_net([IMAGE, (8, 16, 16), (8, 8, 8), (16, 8, 8)])
    x = torch.randn(4, *IMAGE)
    one, two, three = net(x)
    assert torch.equal(net.segments[1](one), two)
    assert torch.equal(net.segments[2](two), three)
    assert [torch.equal(a, b) for a, b in zip(net(x, depth=2), (one, two), strict=True)] == [True, True]


def test_auxiliary_variables_are_not_negative_like_the_stages_outputs() -> None:
    for segment in SEGMENTS:
        (variable,) = build_aux_net([IMAGE, (8, 16, 16)], segment=segment)(torch.randn(4, *IMAGE))
        assert variable.min() >= 0
        assert variable.max() > 0


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    shapes = [IMAGE, (8, 16, 16), (16, 8, 8)]
    one = build_aux_net(shapes, seed=1).state_dict()
    torch.randn(10)
    two, other = build_aux_net(shapes, seed=1).state_dict(), build_aux_net(shapes, seed=2).state_dict()
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    assert not torch.equal(one["segments.0.conv.weight"], other["segments.0.conv.weight"])


def test_it_keeps_no_running_statistics() -> None:
    assert list(build_aux_net([IMAGE, (8, 16, 16)]).buffers()) == []


def test_depth_adds_blocks_and_width_widens_them() -> None:
    plain, deep, wide = (build_aux_net([IMAGE, (8, 16, 16)], **option) for option in ({}, {"depth": 3}, {"width": 0.5}))
    assert len(plain.segments[0].blocks) == 1
    assert len(deep.segments[0].blocks) == 3
    assert wide.segments[0].blocks[0].conv1.out_channels == 4


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([IMAGE, (10,)], r"boundary 0 lies between shapes \(3, 32, 32\) and \(10,\)"),
        ([IMAGE, (8, 16, 16), (8, 32, 32)], r"boundary 1 goes from shape \(8, 16, 16\) up to \(8, 32, 32\)"),
    ],
)
def test_a_boundary_that_no_segment_reaches_is_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_aux_net(shapes)


def test_light_segments_cost_a_small_part_of_the_network() -> None:
    layers = build_layers("resnet110", num_classes=10)
    after = boundary_shapes(layers, input_shape=IMAGE)
    before = [IMAGE, *after[:-1]]
    network = sum(
        multiply_accumulates(layer.make, input_shape=shape) for layer, shape in zip(layers, before, strict=True)
    )
    shapes = [IMAGE, after[18], after[36]]
    aux = multiply_accumulates(lambda: _Chain(shapes), input_shape=IMAGE)
    assert 0 < aux < 0.05 * network


class _Chain(torch.nn.Module):
    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.net = build_aux_net(shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[-1]
