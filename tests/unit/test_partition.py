"""Cuts: the dynamic programme against brute force, the AuxNet's share, and the methods of the configuration."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dsaux.config import ConfigError
from dsaux.models import build_layers
from dsaux.models.shapes import SampleSpec
from dsaux.partition import Partition, SegmentTimes, balance, choose_bounds

CPU = torch.device("cpu")


def choose(method: object, num_stages: int, *, model: str = "resnet14", with_aux: bool = True) -> Partition:
    return choose_bounds(
        method,  # type: ignore[arg-type]
        layers=build_layers(model, num_classes=5),
        num_stages=num_stages,
        input_spec=(3, 16, 16),
        aux_depth=1,
        aux_width=1.0,
        aux_segment="light",
        micro_batch_size=4,
        device=CPU,
        with_aux=with_aux,
        seed=0,
    )


def brute_force(costs: list[float], num_stages: int, shapes: list[tuple[int, ...]] | None, segment: object) -> float:
    """Smallest largest stage cost over all cuts, the AuxNet's prefix added as the engine evaluates it."""
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1):
        bounds = [0, *cuts, len(costs)]
        path = [None, *(shapes[cut - 1] for cut in cuts)] if shapes else [None]
        steps = [segment(a, b) for a, b in itertools.pairwise(path)] if shapes else [0.0] * (num_stages - 1)
        stages = [
            sum(costs[bounds[k] : bounds[k + 1]]) + sum(steps[: min(k + 1, num_stages - 1)]) for k in range(num_stages)
        ]
        best = min(best, max(stages))
    return best


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("trial", range(5))
def test_balance_finds_the_optimum(num_stages: int, trial: int) -> None:
    draw = random.Random(trial)
    costs = [draw.uniform(0.1, 3.0) for _ in range(8)]
    bounds, stage_costs = balance(costs, num_stages=num_stages)
    assert max(stage_costs) == pytest.approx(brute_force(costs, num_stages, None, None))
    assert stage_costs == pytest.approx([sum(costs[a:b]) for a, b in itertools.pairwise(bounds)])


@pytest.mark.parametrize("num_stages", [2, 3, 4, 6])
@pytest.mark.parametrize("trial", range(5))
def test_balance_counts_a_local_head_with_the_stage_that_has_it(num_stages: int, trial: int) -> None:
    draw = random.Random(trial)
    costs = [draw.uniform(0.1, 3.0) for _ in range(9)]
    specs = [SampleSpec((size,)) for size in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    table = {SampleSpec((1,)): draw.uniform(0.1, 3.0), SampleSpec((2,)): float("inf"), SampleSpec((3,)): 0.1}

    def stages(bounds: tuple[int, ...]) -> list[float]:
        own = [table[specs[cut - 1]] for cut in bounds[1:-1]]
        return [sum(costs[a:b]) + head for (a, b), head in zip(itertools.pairwise(bounds), [*own, 0.0], strict=True)]

    cuts = itertools.combinations(range(1, 9), num_stages - 1)
    best = min(max(stages((0, *inner, 9))) for inner in cuts)
    if best == float("inf"):
        with pytest.raises(ValueError, match="whose boundaries have local heads"):
            balance(costs, num_stages=num_stages, specs_after=specs, heads=table.__getitem__)
        return
    bounds, stage_costs = balance(costs, num_stages=num_stages, specs_after=specs, heads=table.__getitem__)
    assert max(stage_costs) == pytest.approx(best)
    assert list(stage_costs) == pytest.approx(stages(bounds))


@pytest.mark.parametrize("num_stages", [2, 3, 4, 6])
@pytest.mark.parametrize("trial", range(5))
def test_balance_counts_the_segments_that_each_stage_evaluates(num_stages: int, trial: int) -> None:
    draw = random.Random(trial)
    costs = [draw.uniform(0.1, 3.0) for _ in range(9)]
    shapes = [(1,)] * 3 + [(2,)] * 3 + [(3,)] * 3
    table = {(a, b): draw.uniform(0.1, 1.0) for a in (None, (1,), (2,), (3,)) for b in ((1,), (2,), (3,))}

    def segment(a: object, b: object) -> float:
        return table[a, b]

    bounds, stage_costs = balance(costs, num_stages=num_stages, specs_after=shapes, segments=segment)
    assert max(stage_costs) == pytest.approx(brute_force(costs, num_stages, shapes, segment))
    assert bounds[0] == 0
    assert bounds[-1] == 9
    assert all(a < b for a, b in itertools.pairwise(bounds))


def test_cuts_that_the_auxnet_cannot_make_are_never_chosen() -> None:
    shapes = [(1,), (2,), (2,), (1,)]
    bounds, _ = balance(
        [1.0] * 4, num_stages=2, specs_after=shapes, segments=lambda a, b: 0.0 if b == (1,) else float("inf")
    )
    assert bounds == (0, 1, 4)
    with pytest.raises(ValueError, match="cannot be cut into 2 stages"):
        balance([1.0] * 4, num_stages=2, specs_after=shapes, segments=lambda a, b: float("inf"))


def test_what_the_last_layer_makes_is_never_asked_for() -> None:
    """The network's output is no boundary: a segment of one's own need not be able to make it."""
    shapes, asked = [(1,), (2,), (1,), (3,)], []

    def segment(source: object, target: object) -> float:
        asked.append(target)
        return 0.0

    balance([1.0] * 4, num_stages=3, specs_after=shapes, segments=segment)
    assert set(asked) == {(1,), (2,)}


def test_segment_times_are_measured_once_for_each_pair_of_shapes() -> None:
    asked = []

    def measure(source: tuple[int, ...], target: tuple[int, ...], *, first: bool) -> float:
        asked.append((source, target, first))
        return 1.0

    times = SegmentTimes(measure, input_spec=(3, 8, 8))
    assert [times(None, (4, 8, 8)), times(None, (4, 8, 8)), times((4, 8, 8), (4, 8, 8))] == [1.0, 1.0, 1.0]
    assert asked == [((3, 8, 8), (4, 8, 8), True), ((4, 8, 8), (4, 8, 8), False)]


def test_uniform_gives_equal_numbers_of_layers() -> None:
    assert choose("uniform", 4) == Partition((0, 2, 4, 6, 8), (2.0, 2.0, 2.0, 2.0), unit="layers", method="uniform")


def test_parameters_puts_most_layers_first() -> None:
    partition = choose("parameters", 2)
    assert partition.bounds[1] > 4
    assert partition.unit == "parameters"
    with torch.device("meta"):
        whole = sum(p.numel() for layer in build_layers("resnet14", num_classes=5) for p in layer.make().parameters())
    assert sum(partition.stage_costs) == whole


@pytest.mark.parametrize(("num_stages", "with_aux"), [(1, True), (2, True), (3, True), (3, False)])
def test_time_measures_and_cuts(num_stages: int, with_aux: bool) -> None:
    partition = choose("time", num_stages, with_aux=with_aux)
    assert len(partition.bounds) == num_stages + 1
    assert all(cost > 0 for cost in partition.stage_costs)
    assert partition.unit == ("layers" if num_stages == 1 else "s")


def test_given_bounds_are_taken_by_index_or_name() -> None:
    by_name, by_index = choose(["group1.block2", "group3.block1"], 3), choose([2, 5], 3)
    assert by_name.bounds == by_index.bounds == (0, 2, 5, 8)
    assert by_name.method == "bounds"


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="must increase"):
        choose([5, 2], 3)
    with pytest.raises(ValueError, match="9 stages need at least 9 layers; the network has 8"):
        choose("uniform", 9)
