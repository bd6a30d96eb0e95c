"""What the benchmark tells the planner of the machine: paces, hollow layers, the engines' own time. No rank starts."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import cases
import crew
import duel
import gauges
from contestants import CONTESTANTS, LOCK_STEP
from forecast import Forecast
from work import Work, model_work, sleeping_work

from dsaux.models import boundary_specs
from dsaux.plan_workload import IMPOSSIBLE
from dsaux.planner import BackwardSplit, LayerTimes, Link, SegmentCost, Workload, predict

COMPUTED = ("compute", "network")
LINK = Link(1e9, 1e-5)


def small_work() -> Work:
    return model_work("resnet8", image_size=8, global_batch=8)


def workload(**changes: Any) -> Workload:
    settings: dict[str, Any] = {
        "layer_names": ("a", "b", "c", "d"),
        "times": {4: (LayerTimes(1.0, 2.0),) * 4, 8: (LayerTimes(2.0, 4.0),) * 4},
        "update_s": (0.5,) * 4,
        "parameter_bytes": (8,) * 4,
        "activation_bytes": (400, 100, 100, 40),
        "kept_bytes": (1000,) * 4,
        "splits": {4: BackwardSplit(0.75, 0.5)},
    }
    return Workload(**{**settings, **changes})


# ---- lock-step ------------------------------------------------------------------------------------------------------


def test_every_entry_of_a_case_with_real_layers_has_a_gauge_that_shares_its_batch_evenly() -> None:
    for case in itertools.chain.from_iterable(cases.cases_of(suite, quick=False, cores=2) for suite in COMPUTED):
        batch = case.make_work().global_batch
        known = {
            gauges.Pace(gauge.ranks, gauge.threads, count)
            for gauge in gauges.lock_step_entries(case)
            for count in gauge.micro_batches
        }
        assert known == {gauges.pace_of(entry, count) for entry in case.entries for count in entry.micro_batches}
        assert all(batch % pace.micro_batches == 0 for pace in known)
        assert all(pace.micro_batches in (pace.ranks * pace.passes, *range(1, pace.ranks)) for pace in known)
        assert {gauge.contestant for gauge in gauges.lock_step_entries(case)} == {LOCK_STEP}


def test_stages_that_sleep_have_no_pace_to_measure() -> None:
    case = cases.cases_of("sleep", quick=False, cores=2)[1]
    assert gauges.lock_step_entries(case) == []


def test_engines_are_measured_where_no_auxnet_hides_them() -> None:
    sleeping, computing = (cases.cases_of(suite, quick=False, cores=2)[1] for suite in ("sleep", "compute"))
    assert gauges.hollow_entries(sleeping) == list(sleeping.entries)
    assert [entry.contestant for entry in gauges.hollow_entries(computing)] == list(cases.EXACT)


@pytest.mark.parametrize(
    ("contestant", "ranks", "micro_batches", "size", "passes"),
    [
        ("one-process", 1, 4, 32, 4),
        ("ddp", 2, 4, 16, 4),
        ("deepspeed-1f1b", 2, 8, 16, 4),
        ("dsaux-al", 2, 2, 64, 1),
        ("dsaux-al", 2, 1, 128, 1),
        ("dsaux-al", 4, 2, 64, 1),
        ("torch-zbv", 4, 16, 8, 4),
    ],
)
def test_a_gauge_has_the_size_of_the_entry_s_micro_batch_and_as_much_to_do(
    contestant: str, ranks: int, micro_batches: int, size: int, passes: int
) -> None:
    pace = gauges.pace_of(cases.Entry(contestant, ranks, (micro_batches,), threads=3), micro_batches)
    assert (pace.ranks, pace.threads) == (ranks, 3)
    assert (128 // pace.micro_batches, pace.passes) == (size, passes)


# ---- hollow layers --------------------------------------------------------------------------------------------------


def test_hollow_layers_have_the_network_s_sizes_and_a_parameter_each() -> None:
    both = real, hollow = small_work(), gauges.hollow_work(small_work)
    shapes = [[spec.shape for spec in boundary_specs(list(work.layers), input_spec=work.input_spec)] for work in both]
    assert shapes[0] == shapes[1]
    assert [layer.name for layer in hollow.layers] == [layer.name for layer in real.layers]
    assert [sum(p.numel() for p in layer.make().parameters()) for layer in hollow.layers] == [1] * len(hollow.layers)


def test_hollow_layers_hand_gradients_to_inputs_and_parameters() -> None:
    hollow = gauges.hollow_work(small_work)
    x = torch.zeros(2, 3, 8, 8, requires_grad=True)
    model = hollow.build(0, len(hollow.layers))
    out = model(x)
    assert out.shape == (2, hollow.num_classes)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros(1)) for p in model.parameters() if p.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hollow_layers_of_different_sizes_are_told_apart_when_layers_are_timed() -> None:
    """Layers of equal text and input are timed once."""
    specs = boundary_specs(list(small_work().layers), input_spec=small_work().input_spec)
    texts = {repr(layer.make()) for layer in gauges.hollow_work(small_work).layers}
    assert len(texts) == len(set(specs))


def test_hollow_layers_can_use_up_processor_time() -> None:
    work = small_work()
    spin = [LayerTimes(0.001 * (index + 1), 0.002 * (index + 1)) for index in range(len(work.layers))]
    spinning = gauges.hollow_work(small_work, spin=spin)
    both = [boundary_specs(list(each.layers), input_spec=work.input_spec) for each in (work, spinning)]
    assert [spec.shape for spec in both[0]] == [spec.shape for spec in both[1]]
    model = spinning.build(0, len(spinning.layers))
    samples = 4
    seconds = []
    x = torch.ones(samples, 3, 8, 8)
    for run in (lambda: model(x), lambda: model(x).sum().backward()):
        started = time.thread_time()
        run()
        seconds.append(time.thread_time() - started)
    wanted = [samples * sum(its.forward_s for its in spin), samples * sum(its.total_s for its in spin)]
    assert all(took >= least for took, least in zip(seconds, wanted, strict=True))
    assert seconds[1] - seconds[0] >= 0.9 * (wanted[1] - wanted[0]), "backward as well"
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len({repr(layer) for layer in model}) == len(spin), "told apart when layers are timed"


def test_hollow_sleepers_stay_awake_and_compute_as_before() -> None:
    def make() -> Work:
        return sleeping_work(stages=2, global_batch=8, forward_s=1e6, backward_s=1e6)

    hollow = gauges.hollow_work(make)
    model = hollow.build(0, len(hollow.layers))
    x = torch.ones(2, 3, 8, 8)
    model(x).sum().backward()
    assert hollow.sleeper is not None
    assert hollow.sleeper.slept_s < 1.0
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- what the planner makes of it -----------------------------------------------------------------------------------


def test_a_pace_scales_passes_and_segments_and_nothing_else() -> None:
    given = workload(
        segment_cost=lambda source, target, size: SegmentCost(1.0, 2.0, 3.0, 4) if target < 3 else IMPOSSIBLE,
        head_cost=lambda cut, size: SegmentCost(5.0, 6.0),
    )
    paced = gauges.at_pace(given, 1.5, overhead_s=0.25)
    assert paced.layer_times(4) == (LayerTimes(1.5, 3.0),) * 4
    assert paced.layer_times(8) == (LayerTimes(3.0, 6.0),) * 4
    assert paced.segment(None, 1, 4) == SegmentCost(1.5, 3.0, 3.0, 4)
    assert not paced.segment(None, 4, 4).is_possible
    assert paced.head(1, 4) == SegmentCost(7.5, 9.0)
    assert paced.split(4) == given.split(4)
    assert (paced.update_s, paced.overhead_s) == (given.update_s, 0.25)
    assert given.layer_times(4) == (LayerTimes(1.0, 2.0),) * 4


@pytest.mark.parametrize("contestant", cases.EXACT)
@pytest.mark.parametrize("overhead_s", [0.0, 0.003])
def test_an_engine_s_own_time_is_found_from_the_step_that_it_makes(contestant: str, overhead_s: float) -> None:
    shape: dict[str, Any] = {"stages": 2, "micro_batches": 8, "global_batch": 32, "link": LINK}
    bounds = (0, 1, 2, 3, 4) if CONTESTANTS[contestant].chunks == 2 else (0, 2, 4)
    hollow = workload(times={4: (LayerTimes(1e-5, 2e-5),) * 4}, update_s=(1e-4,) * 4)
    engine = gauges.at_pace(hollow, 1.0, overhead_s=overhead_s)
    step = predict(engine, contestant, replicas=1, bounds=bounds, **shape)
    found = gauges.engine_overhead_s(hollow, contestant, bounds=bounds, step_s=step.step_s, **shape)
    assert found == pytest.approx(overhead_s, abs=1e-8)


def test_an_engine_that_is_faster_than_its_model_has_no_time_of_its_own() -> None:
    found = gauges.engine_overhead_s(
        workload(), "torch-1f1b", stages=2, micro_batches=8, global_batch=32, link=LINK, bounds=(0, 2, 4), step_s=1e-3
    )
    assert found == pytest.approx(0.0, abs=1e-12)


def test_a_forecast_goes_by_the_gauges_only_where_it_is_asked_to() -> None:
    work = sleeping_work(stages=2, global_batch=8, forward_s=1.0, backward_s=2.0)
    forecast, entry = Forecast(work), cases.Entry("deepspeed-1f1b", 2, (4,))
    before = forecast.outlook(entry, 4)
    whole_s = 2 * (1.0 + 2.0)  # of both stages for the whole batch
    forecast.learn_pace(gauges.pace_of(entry, 4), 2.0 * whole_s / 2)  # half the batch on each rank, twice as slow
    once, gauged = forecast.outlook(entry, 4), forecast.outlook(entry, 4, gauged=True)
    assert once == before
    assert gauged.prediction.step_s == pytest.approx(2.0 * once.prediction.step_s, rel=1e-3)
    other = cases.Entry("deepspeed-1f1b", 2, (8,))
    assert forecast.outlook(other, 8, gauged=True) == forecast.outlook(other, 8), "another size has another gauge"


@pytest.mark.parametrize("contestant", ["deepspeed-1f1b", "dsaux-penalty"])
def test_the_processor_time_of_an_engine_comes_on_top_of_stages_that_sleep(contestant: str) -> None:
    work = sleeping_work(stages=2, global_batch=8, forward_s=1.0, backward_s=2.0)
    forecast, entry = Forecast(work), cases.Entry(contestant, 2, (4,))
    once = forecast.outlook(entry, 4)
    forecast.learn_engine(entry, 4, bounds=once.bounds, step_s=9.0, cpu_s=0.4)
    gauged = forecast.outlook(entry, 4, gauged=True)
    ticks = 4 + 1 if contestant == "deepspeed-1f1b" else 4  # micro-batches behind each other, and the fill
    assert gauged.prediction.step_s - once.prediction.step_s == pytest.approx(ticks * 0.1, rel=1e-3)
    assert forecast.outlook(entry, 4) == once


# ---- rounds ---------------------------------------------------------------------------------------------------------


class FakeCrew:
    """Answers every order with the orders it has had so far, or fails."""

    def __init__(self, entry: cases.Entry, log: list[tuple[str, int, crew.Order]], *, fails: bool = False) -> None:
        self.entry, self.log, self.fails = entry, log, fails

    def block(self, order: crew.Order) -> list[crew.Window]:
        self.log.append((self.entry.contestant, order.micro_batches, order))
        if self.fails:
            raise crew.CrewError("out of memory")
        return [crew.Window(float(len(self.log)), 0.0, 0.0, 0, 0, None)]


ONE, DDP, LOCK = cases.Entry("one-process", 1, (1,)), cases.Entry("ddp", 2, (1, 2)), cases.Entry(LOCK_STEP, 2, (1,))


def rounds_of(crews: Mapping[cases.Entry, FakeCrew]) -> tuple[duel._Rounds, dict[duel.Turn, Any]]:
    case = cases.Case("compute", "net", (ONE, DDP), small_work, steps=5, blocks=2)
    turns = [duel.Turn(entry, count) for entry in case.entries for count in entry.micro_batches]
    rounds = duel._Rounds(case, turns, [duel.Turn(LOCK, 1)], dict.fromkeys(turns, (0, 5)))
    return rounds, rounds.measure(crews, tell=lambda text: None)  # type: ignore[arg-type]


def per_round(log: list[tuple[str, int, crew.Order]]) -> Iterator[list[tuple[str, int]]]:
    names = [(name, count) for name, count, _ in log]
    yield from (names[first : first + 5] for first in range(0, len(names), 5))


def test_in_a_round_every_contestant_has_a_block_and_every_gauge_two_shorter_ones() -> None:
    log: list[tuple[str, int, crew.Order]] = []
    rounds, blocks = rounds_of({entry: FakeCrew(entry, log) for entry in (ONE, DDP, LOCK)})
    lock, one, ddp, other = (LOCK_STEP, 1), ("one-process", 1), ("ddp", 1), ("ddp", 2)
    assert list(per_round(log)) == [
        [one, lock, ddp, other, lock],  # builds and warms up
        [one, lock, ddp, other, lock],
        [ddp, lock, other, one, lock],
    ]
    assert [order.steps for _, _, order in log[:5]] == [1] * 5
    assert [order.steps for _, _, order in log[5:10]] == [5, 2, 5, 5, 2]
    assert {turn.entry.contestant: len(own) for turn, own in blocks.items()} == {
        "one-process": 2,
        "ddp": 2,
        LOCK_STEP: 4,
    }
    assert rounds.failed == {}


def test_who_fails_has_no_more_blocks_and_the_others_go_on() -> None:
    log: list[tuple[str, int, crew.Order]] = []
    crews = {entry: FakeCrew(entry, log, fails=entry == DDP) for entry in (ONE, DDP, LOCK)}
    rounds, blocks = rounds_of(crews)
    assert rounds.failed == {duel.Turn(DDP, 1): "out of memory", duel.Turn(DDP, 2): "out of memory"}
    assert [name for name, _, _ in log].count("ddp") == 1
    assert len(blocks[duel.Turn(ONE, 1)]) == 2


def test_the_step_of_a_block_is_the_mean_over_its_steps_and_ranks() -> None:
    windows = [crew.Window(seconds, 0.0, 0.0, 0, 0, None) for seconds in (2.0, 4.0)]
    assert duel._step_s([windows, windows[:1]], 2) == [1.5, 1.0]
