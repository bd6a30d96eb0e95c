"""The AuxNet: shapes for every cut, the chain, seeds, cost."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from dsaux.models import boundary_specs, build_layers
from dsaux.models.auxnet import SEGMENTS, build_aux_net

IMAGE = (3, 32, 32)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("cuts", list(itertools.combinations(range(1, 8), 2)))
def test_every_pair_of_cuts_gets_segments_of_the_boundaries_shapes(segment: str, cuts: tuple[int, int]) -> None:
    after = boundary_specs(build_layers("resnet14", num_classes=5), input_spec=IMAGE)
    shapes = [IMAGE, *(after[cut - 1] for cut in cuts)]
    variables = build_aux_net(shapes, segment=segment)(torch.randn(2, *IMAGE))
    assert [tuple(variable.shape[1:]) for variable in variables] == [spec.shape for spec in shapes[1:]]


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize(
    ("model", "side"), [("resnet18", 64), ("resnet50", 32), ("wrn16_2", 32), ("cifar_resnet8", 32)]
)
def test_every_place_to_cut_a_network_gets_a_segment(segment: str, model: str, side: int) -> None:
    image = (3, side, side)
    after = boundary_specs(build_layers(model, num_classes=5, input_spec=image), input_spec=image)[:-1]
    pairs = random.Random(0).sample(list(itertools.combinations(range(len(after)), 2)), k=3)
    with torch.device("meta"):
        for cuts in [*((cut,) for cut in range(len(after))), *pairs]:
            specs = [image, *(after[cut] for cut in cuts)]
            variables = build_aux_net(specs, segment=segment)(torch.empty(2, *image))
            assert [tuple(variable.shape[1:]) for variable in variables] == [after[cut].shape for cut in cuts]


@pytest.mark.parametrize("segment", SEGMENTS)
def test_a_variable_has_both_signs_where_the_boundary_has(segment: str) -> None:
    after = boundary_specs(build_layers("wrn10_1", num_classes=5), input_spec=IMAGE)
    for variable in build_aux_net([IMAGE, after[1], after[2]], segment=segment)(torch.randn(4, *IMAGE)):
        assert variable.min() < 0 < variable.max()


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


def test_a_bottleneck_segment_passes_on_a_variable_whose_shape_stays() -> None:
    shape = (8, 4, 4)
    same, other = build_aux_net([IMAGE, shape, shape, (16, 4, 4)], segment="bottleneck").segments[1:]
    assert isinstance(same.projection, torch.nn.Identity)
    assert not isinstance(other.projection, torch.nn.Identity)
    torch.nn.init.zeros_(same.blocks[0].bn3.weight)
    x = torch.rand(2, *shape)
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    assert torch.equal(same(x), x + torch.nn.functional.interpolate(pooled, scale_factor=2.0))


@pytest.mark.parametrize(
    ("size", "strided", "kernel"),
    [(224, 0, 3), (112, 1, 1), (56, 2, 1), (28, 3, 1), (14, 3, 1), (1, 3, 1), (200, 0, 3)],
)
def test_the_first_bottleneck_segment_lowers_the_resolution_early(size: int, strided: int, kernel: int) -> None:
    with torch.device("meta"):
        (segment,) = build_aux_net([(3, 224, 224), (32, size, size)], segment="bottleneck").segments
    assert len(segment.stem) == strided
    assert segment.projection[0].kernel_size == (kernel, kernel)


def test_the_width_of_a_bottleneck_segment_is_a_share_of_a_quarter_of_the_channels() -> None:
    options: list[dict[str, Any]] = [{}, {"width": 0.5}, {"width": 4.0}, {"width": 1e-3}]
    with torch.device("meta"):
        nets = [build_aux_net([IMAGE, (64, 8, 8)], segment="bottleneck", **option) for option in options]
    assert [net.segments[0].blocks[0].conv2.out_channels for net in nets] == [16, 8, 64, 1]
