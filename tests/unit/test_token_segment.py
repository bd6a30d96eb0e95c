"""Segments for tokens: shapes, masks, weights by seed, cost, and every cut of the example networks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from dsaux.config import load_config
from dsaux.data import dataset_facts
from dsaux.models import boundary_specs
from dsaux.models.auxnet import build_aux_net, make_segment
from dsaux.models.causality import run_layers
from dsaux.models.cost import multiply_accumulates
from dsaux.models.shapes import SampleSpec
from dsaux.models.token_segment import HEAD_WIDTH, TokenBlock, TokenSegment, patch_of

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGE = SampleSpec((3, 32, 32))
TEXT = SampleSpec((12,), causal=True, vocabulary=9)
CONFIGS = ("gpt_text", "vit_photos")


def segment(source: SampleSpec, target: SampleSpec, *, depth: int = 1, width: float = 1.0, kind: str = "light"):
    return make_segment(source, target, kind=kind, depth=depth, width=width, first=True)


@pytest.mark.parametrize("kind", ["light", "full"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (IMAGE, SampleSpec((64, 24))),
        (IMAGE, SampleSpec((65, 24))),
        (SampleSpec((1, 8, 16)), SampleSpec((32, 8))),
        (TEXT, SampleSpec((12, 24), causal=True)),
        (SampleSpec((12, 8)), SampleSpec((12, 24))),
        (SampleSpec((12, 24)), SampleSpec((12, 24), nonnegative=True)),
        (SampleSpec((1, 24)), SampleSpec((1, 24))),
    ],
)
def test_segment_makes_the_boundary(kind: str, source: SampleSpec, target: SampleSpec) -> None:
    net = segment(source, target, depth=2, kind=kind)
    out = net(source.random(3, device="cpu"))
    assert out.shape == (3, *target.shape)
    assert bool((out >= 0).all()) is target.nonnegative
    out.square().mean().backward()
    assert all(weight.grad is not None for weight in net.parameters())
    assert not list(net.buffers()), "no statistics: replicas that see other depths stay equal"


@pytest.mark.parametrize(
    ("tokens", "patch", "has_token"), [(64, (4, 4), False), (65, (4, 4), True), (17, (8, 8), True)]
)
def test_patches_are_square_where_they_can_be(tokens: int, patch: tuple[int, int], has_token: bool) -> None:
    assert patch_of((3, 32, 32), (tokens, 8)) == (patch, has_token)


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (IMAGE, (67, 8), r"boundary 4: no patches of an image of shape \(3, 32, 32\) make 67 tokens"),
        (SampleSpec((12, 8)), (6, 8), r"boundary 4: tokens of shape \(12, 8\) become \(6, 8\); a segment keeps"),
        (TEXT, (1, 8), "keeps the number of tokens"),
        (SampleSpec((12, 8)), (8, 4, 3), r"boundary 4 lies between shapes"),
        (TEXT, (9,), r"boundary 4 lies between shapes"),
    ],
)
def test_other_shapes_are_refused(source: SampleSpec, target: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_segment(source, SampleSpec(target), kind="light", depth=1, width=1.0, first=False, boundary=4)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_causal_chain_never_sees_later_tokens(is_causal: bool, depth: int) -> None:
    target = SampleSpec((12, 32), causal=is_causal)
    net = build_aux_net([TEXT, target, target], depth=depth, seed=2)
    plain = TEXT.random(2, device="cpu")
    for place in range(1, 12):
        other = plain.clone()
        other[:, place:] = (other[:, place:] + 1) % 9
        same = [torch.equal(one[:, :place], two[:, :place]) for one, two in zip(net(plain), net(other), strict=True)]
        assert same == [is_causal, is_causal], "equal to the bit"


def test_weights_come_from_seed_and_boundary() -> None:
    target = SampleSpec((12, 32), causal=True)
    one, two, other = (build_aux_net([TEXT, target, target], seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["segments.1.blocks.0.qkv.weight"], other["segments.1.blocks.0.qkv.weight"])
    assert not torch.equal(one["segments.0.blocks.0.qkv.weight"], one["segments.1.blocks.0.qkv.weight"])


def test_kind_width_and_depth_set_the_size() -> None:
    target = SampleSpec((12, 64))
    sizes = {
        (kind, width): segment(target, target, kind=kind, width=width).blocks[0].qkv.out_features // 3
        for kind in ("light", "full")
        for width in (0.5, 1.0)
    }
    assert sizes == {("light", 0.5): 8, ("light", 1.0): 16, ("full", 0.5): 32, ("full", 1.0): 64}
    assert len(segment(target, target, depth=3).blocks) == 3
    assert segment(target, target, width=0.001).blocks[0].qkv.out_features == 3


def test_attention_is_counted_among_the_multiply_accumulates() -> None:
    tokens, channels, inner = 20, 32, HEAD_WIDTH
    linear = tokens * (channels * 3 * inner + inner * channels + 2 * channels * inner)
    attention = 2 * tokens * tokens * inner
    counted = multiply_accumulates(
        lambda: TokenBlock(channels, inner, causal=True), input_spec=SampleSpec((tokens, channels))
    )
    assert counted == linear + attention


def _network(name: str):
    config = load_config(ROOT / "ds_configs" / f"{name}.json").dsaux
    facts = dataset_facts(config.data)
    spec = facts.input_spec
    layers = run_layers(config, num_classes=facts.num_classes, input_spec=spec)
    return config, spec, layers, boundary_specs(layers, input_spec=spec)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_cut_of_the_examples_can_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, spec, layers, after = _network(name)
    for first, second in itertools.combinations(range(1, len(layers)), 2):
        net = build_aux_net([spec, after[first - 1], after[second - 1]])
        assert [tuple(out.shape[1:]) for out in net(spec.random(1, device="cpu"))] == [
            after[first - 1].shape,
            after[second - 1].shape,
        ]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_aux_net_of_the_examples_costs_a_few_per_cent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, spec, layers, after = _network(name)
    names = [layer.name for layer in layers]
    cuts = [entry if isinstance(entry, int) else names.index(entry) for entry in config.pipeline.partition]
    specs = [spec, *(after[cut - 1] for cut in cuts)]
    network = sum(
        multiply_accumulates(layer.make, input_spec=before)
        for layer, before in zip(layers, [spec, *after[:-1]], strict=True)
    )
    aux = sum(
        multiply_accumulates(
            lambda one=one, two=two: TokenSegment(
                one, two, depth=config.aux.depth, width=config.aux.width, kind=config.aux.segment
            ),
            input_spec=one,
        )
        for one, two in itertools.pairwise(specs)
    )
    print(f"{name}: AuxNet {aux:,} of {network:,} multiply-accumulates a sample, {100 * aux / network:.2f} %")
    assert 0 < aux < 0.06 * network
    assert all(spec.causal is (name == "gpt_text") for spec in after[:-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_pairs_of_configurations_differ_in_schedule_and_name_alone(name: str) -> None:
    one, two = (json.loads((ROOT / "ds_configs" / f"{name}{suffix}.json").read_text()) for suffix in ("", "_1f1b"))
    assert two["dsaux"]["pipeline"].pop("schedule") == "1f1b"
    assert one["dsaux"]["pipeline"].pop("schedule") == "al"
    assert two["dsaux"]["run"].pop("name") == one["dsaux"]["run"].pop("name") + "_1f1b"
    assert one == two
