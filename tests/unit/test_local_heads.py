"""The heads of greedy local losses: shapes, weights from the seed, cost, and tokens that do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsaux.models import boundary_specs, build_layers
from dsaux.models.cost import chain_cost, multiply_accumulates
from dsaux.models.local_heads import ImageHead, build_local_heads, make_local_head
from dsaux.models.shapes import SampleSpec


@pytest.mark.parametrize("shape", [(16, 32, 32), (64, 8, 8), (6, 5, 7), (8, 2, 2), (8, 1, 1), (8, 1, 9)])
def test_an_image_head_makes_scores_of_any_feature_map(shape: tuple[int, ...]) -> None:
    (head,) = build_local_heads([shape], scores=(7,))
    assert isinstance(head, ImageHead)
    assert head(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(
    ("shape", "scores", "expected"), [((9, 4), (5,), (3, 5)), ((9, 4), (9, 5), (3, 9, 5)), ((4,), (5,), (3, 5))]
)
def test_tokens_and_vectors_have_heads(
    shape: tuple[int, ...], scores: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    (head,) = build_local_heads([shape], scores=scores)
    assert head(torch.randn(3, *shape)).shape == expected


@pytest.mark.parametrize(
    ("shape", "scores"), [((4, 3, 3), (9, 5)), ((9, 4), (8, 5)), ((4, 2, 2, 2), (5,)), ((4,), (9, 5))]
)
def test_a_boundary_without_a_head_is_named(shape: tuple[int, ...], scores: tuple[int, ...]) -> None:
    before = (*scores[:-1], 4)
    with pytest.raises(ValueError, match=r"boundary 1 has shape .* Move this cut"):
        build_local_heads([before, shape], scores=scores)


def test_weights_depend_on_seed_and_boundary_alone() -> None:
    shapes = [(4, 8, 8), (4, 8, 8)]
    torch.manual_seed(1)
    first, second = build_local_heads(shapes, scores=(3,), seed=5)
    torch.manual_seed(2)
    again, _ = build_local_heads(shapes, scores=(3,), seed=5)
    other, _ = build_local_heads(shapes, scores=(3,), seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for different in (second, other):
        assert not torch.equal(first.convolutions[0].weight, different.convolutions[0].weight)


def test_no_head_keeps_running_statistics() -> None:
    for head in build_local_heads([(4, 8, 8), (9, 4), (4,)], scores=(3,)):
        assert not list(head.buffers())


def test_a_token_head_sees_one_token_at_a_time() -> None:
    head = make_local_head(SampleSpec((6, 4)), scores=SampleSpec((6, 5)))
    tokens = torch.randn(2, 6, 4)
    changed = tokens.clone()
    changed[:, 3] += 1.0
    differs = (head(tokens) != head(changed)).any(dim=-1)
    assert differs[:, 3].all()
    assert not differs[:, [0, 1, 2, 4, 5]].any()


def test_a_head_costs_little_beside_its_stage() -> None:
    layers = build_layers("resnet20", num_classes=10)
    spec = SampleSpec((3, 32, 32))
    after = boundary_specs(layers, input_spec=spec)
    network = chain_cost([layer.make for layer in layers], input_spec=spec).multiply_accumulates
    for boundary in (3, 6):

        def head(boundary: int = boundary) -> nn.Module:
            return make_local_head(after[boundary], scores=after[-1])

        assert multiply_accumulates(head, input_spec=after[boundary]) < 0.02 * network
