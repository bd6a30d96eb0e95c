"""Predictions against closed forms: every figure here can be computed by hand."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dsaux.config import ConfigError
from dsaux.models import boundary_specs, build_layers
from dsaux.models.auxnet import build_aux_net
from dsaux.models.cost import chain_cost
from dsaux.models.local_heads import make_local_head
from dsaux.models.shapes import SampleSpec
from dsaux.partition import measure
from dsaux.plan_file import from_json, to_json
from dsaux.plan_links import all_reduce_bytes
from dsaux.plan_measure import measure_workload
from dsaux.plan_neighbours import Neighbours
from dsaux.plan_orders import ORDERS, ChunkCost, order_of
from dsaux.plan_replay import Compute, Exchange, Message, Post, replay_times
from dsaux.plan_split import measure_split
from dsaux.plan_step import Cut, Setting
from dsaux.plan_workload import IMPOSSIBLE, mix_costs
from dsaux.planner import (
    CONTESTANTS,
    DECOUPLED,
    EXACT,
    BackwardSplit,
    LayerTimes,
    Link,
    Prediction,
    SegmentCost,
    Workload,
    best,
    break_even_aux_share,
    candidates,
    parse_link,
    parse_memory,
    predict,
)

FREE = Link(math.inf)
DIGITS = {"rel": 1e-9}  # the closed form and the replay add the same terms in another order


def equal_layers(num_layers: int, *, forward_s: float = 1.0, samples: int = 1, **changes: object) -> Workload:
    """Layers of one sample-second each way forward and two backward, of tiny parameters, with a free AuxNet."""
    whole = Workload(
        layer_names=tuple(f"layer{index}" for index in range(num_layers)),
        times={samples: (LayerTimes(forward_s, 2 * forward_s),) * num_layers},
        update_s=(0.0,) * num_layers,
        parameter_bytes=(8,) * num_layers,
        activation_bytes=(400,) * num_layers,
        kept_bytes=(1000,) * num_layers,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def step_of(
    workload: Workload,
    contestant: str,
    *,
    stages: int,
    micro_batches: int = 1,
    replicas: int = 1,
    batch: int = 0,
    link: Link = FREE,
    bounds: list[int] | None = None,
) -> Prediction:
    return predict(
        workload,
        contestant,
        stages=stages,
        replicas=replicas,
        micro_batches=micro_batches,
        global_batch=batch or replicas * micro_batches,
        link=link,
        bounds=bounds,
    )


# ---- exact pipelines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contestant", ["deepspeed-1f1b", "torch-1f1b"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (3, 5), (4, 8), (8, 8), (8, 32)])
def test_1f1b_idles_by_its_closed_form(contestant: str, stages: int, micro_batches: int) -> None:
    step = step_of(equal_layers(stages), contestant, stages=stages, micro_batches=micro_batches)
    assert step.idle_share == pytest.approx((stages - 1) / (micro_batches + stages - 1), **DIGITS)
    assert step.step_s == pytest.approx(3.0 * (micro_batches + stages - 1), **DIGITS)
    assert step.samples_per_s == pytest.approx(micro_batches / step.step_s, **DIGITS)


@pytest.mark.parametrize(
    ("micro_batches", "known"),
    [
        (8, {"deepspeed-1f1b": 46.7, "torch-interleaved": 30.4, "torch-zbv": 22.6}),
        (32, {"deepspeed-1f1b": 17.9, "torch-interleaved": 9.9, "torch-zbv": 3.5}),
    ],
)
def test_eight_ranks_idle_by_the_known_figures(micro_batches: int, known: dict[str, float]) -> None:
    """With a backward pass of twice the forward's time, whose halves are the gradients by input and weights."""
    for contestant, percent in known.items():
        step = step_of(equal_layers(16), contestant, stages=8, micro_batches=micro_batches)
        assert 100 * step.idle_share == pytest.approx(percent, abs=0.05)  # the figures have one decimal


def test_interleaving_divides_the_idle_time_by_its_chunks() -> None:
    for stages, micro_batches in ((2, 4), (4, 8), (4, 16)):
        step = step_of(equal_layers(2 * stages), "torch-interleaved", stages=stages, micro_batches=micro_batches)
        bubble = (stages - 1) / 2
        assert step.idle_share == pytest.approx(bubble / (micro_batches + bubble), **DIGITS)


def test_dualpipev_idles_less_than_1f1b_and_more_than_the_zero_bubble_schedule() -> None:
    idle = {
        contestant: step_of(equal_layers(8), contestant, stages=4, micro_batches=8).idle_share
        for contestant in ("deepspeed-1f1b", "deepspeed-dualpipev", "torch-zbv")
    }
    assert idle["deepspeed-1f1b"] > idle["deepspeed-dualpipev"] > idle["torch-zbv"]


@pytest.mark.parametrize("contestant", ORDERS)
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (3, 6), (4, 8)])
def test_every_order_runs_each_pass_of_each_chunk_once_and_ends(
    contestant: str, stages: int, micro_batches: int
) -> None:
    chunks = [ChunkCost(1.0, 2.0, transfer_s=0.25)] * (stages * ORDERS[contestant])
    order = order_of(contestant, chunks=chunks, stages=stages, micro_batches=micro_batches)
    passes = [one for rank in order.passes for one in rank]
    assert len(set(passes)) == len(passes)
    kinds = {"F", "I", "W"} if contestant == "torch-zbv" else {"F", "B"}
    for chunk, micro_batch in itertools.product(range(len(chunks)), range(micro_batches)):
        own = {one.kind for one in passes if (one.chunk, one.micro_batch) == (chunk, micro_batch)}
        # torch's schedule takes the input's gradient of some chunks and the weights' in one
        assert own == kinds or own == {"F", "B"}
    replayed = replay_times(order.operations)
    assert sum(replayed.busy_s) == pytest.approx(3.0 * len(chunks) * micro_batches, **DIGITS)


@pytest.mark.parametrize(
    ("contestant", "stages", "micro_batches", "words"),
    [
        ("deepspeed-dualpipev", 4, 4, "at least 2"),
        ("torch-1f1b", 4, 2, "needs 4 micro-batches"),
        ("torch-interleaved", 2, 5, "must divide 5"),
    ],
)
def test_what_the_engines_refuse_is_refused(contestant: str, stages: int, micro_batches: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        step_of(equal_layers(8), contestant, stages=stages, micro_batches=micro_batches)


def test_a_blocking_pipeline_waits_for_each_transfer() -> None:
    """Two stages, one micro-batch: forward, activation, forward and backward, gradient, backward."""
    link = Link(bytes_per_s=100.0, latency_s=0.5)
    step = step_of(equal_layers(2), "deepspeed-1f1b", stages=2, link=link)
    assert step.step_s == pytest.approx(6.0 + 2 * 4.5, **DIGITS)
    assert step.bytes_per_step == 2 * 400


def test_the_slowest_stage_sets_the_pace_of_a_long_pipeline() -> None:
    times = {1: (LayerTimes(1.0, 2.0), LayerTimes(2.0, 4.0), LayerTimes(1.0, 2.0))}
    work = equal_layers(3, times=times)
    long = step_of(work, "deepspeed-1f1b", stages=3, micro_batches=32)
    # The middle stage works all the time, but that it waits for stage 0's first forward pass (1 s), once for the last
    # stage (1 s: two forward passes of 2 s before the first gradient, which comes 5 s after its start), and stage 0
    # has a last backward pass (2 s) to do.
    assert long.step_s == pytest.approx(1.0 + 32 * 6.0 + 1.0 + 2.0, **DIGITS)
    assert step_of(work, "dsaux-al", stages=3).step_s == pytest.approx(6.0, **DIGITS)


def test_a_balanced_cut_is_found_and_a_given_one_is_kept() -> None:
    times = {1: tuple(LayerTimes(seconds, 2 * seconds) for seconds in (3.0, 1.0, 1.0, 1.0))}
    work = equal_layers(4, times=times)
    assert step_of(work, "torch-1f1b", stages=2, micro_batches=2).bounds == (0, 1, 4)
    assert step_of(work, "torch-1f1b", stages=2, micro_batches=2, bounds=[0, 3, 4]).bounds == (0, 3, 4)
    for wrong in ([0, 4], [0, 2, 3], [0, 2, 2, 4], [1, 2, 4]):
        with pytest.raises(ValueError, match="do not cut 4 layers into 2 pieces"):
            step_of(work, "torch-1f1b", stages=2, micro_batches=2, bounds=wrong)


def test_replicas_sum_each_stage_over_a_ring() -> None:
    link = Link(bytes_per_s=2.0)
    alone = step_of(equal_layers(2), "deepspeed-1f1b", stages=2, link=link)
    two = step_of(equal_layers(2), "deepspeed-1f1b", stages=2, replicas=2, link=link)
    assert two.step_s - alone.step_s == pytest.approx(8 / 2.0, **DIGITS)  # 2(n-1)/n of 8 bytes
    assert two.bytes_per_step == 2 * alone.bytes_per_step + 2 * 16


def test_a_1f1b_stage_keeps_as_many_micro_batches_as_there_are_stages_from_it_on() -> None:
    work = equal_layers(4, parameter_bytes=(0,) * 4)
    assert step_of(work, "torch-1f1b", stages=4, micro_batches=8).memory_bytes == 4 * 1000
    assert step_of(work, "dsaux-penalty", stages=4, micro_batches=8).memory_bytes == 1000


def test_an_exchange_ends_when_both_ends_have_come_and_messages_of_one_way_queue() -> None:
    first, second = (Message(name, 0, 1, seconds=2.0) for name in ("first", "second"))
    streams = [
        [Compute(1.0), Exchange((first, second)), Compute(1.0)],
        [Compute(3.0), Exchange((first,)), Exchange((second,)), Compute(1.0)],
    ]
    assert replay_times(streams).end_s == (8.0, 8.0)


def test_a_posted_message_leaves_its_sender_alone_and_travels_when_it_is_awaited() -> None:
    """sender 1 | 1 | 1, receiver 2 . . | 1: both ends are there at 2, the message has come at 5."""
    message = Message("m", 0, 1, seconds=3.0)
    streams = [[Compute(1.0), Post((message,)), Compute(1.0)], [Compute(2.0), Exchange((message,)), Compute(1.0)]]
    assert replay_times(streams).end_s == (2.0, 6.0)


def test_what_is_sent_without_blocking_queues_on_its_way() -> None:
    """Two things made at 1 and 2 travel for 5 seconds each, one behind the other: they are there at 6 and 11."""
    sender = [Compute(1.0, makes=name, sends_to=(1, 5.0)) for name in ("a", "b")]
    receiver = [Compute(1.0, needs=("a",)), Compute(1.0, needs=("b",))]
    assert replay_times([sender, receiver]).end_s == (2.0, 12.0)


def test_torchs_1f1b_waits_for_its_sends_with_its_receives() -> None:
    """Two stages, two micro-batches, forward 1 s, backward 2 s, a message 4 s each way.

    stage 0   F0 F1 |--- F1 goes, B0 comes ---| B0 |--- B1 comes ---| B1
    stage 1   |- F0 comes -| F0 B0 |- B0 goes, F1 comes -| F1 B1 |- B1 goes -|
    """
    link = Link(bytes_per_s=100.0)
    step = step_of(equal_layers(2), "torch-1f1b", stages=2, micro_batches=2, link=link)
    # F0 leaves at 1 and is there at 5; F0 and B0 on stage 1 until 8; B0 and F1 cross until 12; then F1, B1 until 15,
    # B1 is there at 19, and its last backward pass ends at 21.
    assert step.step_s == pytest.approx(21.0, **DIGITS)


def test_ranks_that_share_a_core_get_equal_parts_of_it() -> None:
    """Seconds are those beside the other: rank 0 needs 1 s of the core, rank 1 needs 3 s, 2 of them alone."""
    found = replay_times([[Compute(2.0)], [Compute(6.0)]], cores=[0, 0])
    assert found.end_s == pytest.approx((2.0, 4.0))
    assert found.busy_s == pytest.approx((1.0, 3.0))


def test_a_rank_that_begins_slows_down_the_other_of_its_core_alone() -> None:
    """Rank 2 begins after 1 s; until then rank 0 has done half of its work, as if it had a core to itself."""
    streams = [[Compute(4.0)], [Compute(1.0, makes="a")], [Compute(2.0, needs=("a",))]]
    found = replay_times(streams, cores=[0, 1, 0])
    assert found.end_s == pytest.approx((3.0, 1.0, 3.0))
    assert found.busy_s == pytest.approx((2.0, 1.0, 1.0))


def test_a_pipeline_on_one_core_takes_the_work_of_all_its_stages_whatever_its_order() -> None:
    layers = equal_layers(8)
    for contestant in ORDERS:
        shape = {"stages": 4, "replicas": 1, "micro_batches": 8, "global_batch": 8}
        found = predict(layers, contestant, link=FREE, cores=1, **shape)  # type: ignore[arg-type]
        assert found.step_s == pytest.approx(8 * 2 * 3.0), contestant  # 2 layers each, beside all: as one alone


def test_one_micro_batch_at_a_time_goes_at_a_core_s_full_speed() -> None:
    shape = {"stages": 4, "replicas": 1, "micro_batches": 1, "global_batch": 1}
    apart = predict(equal_layers(4), "deepspeed-1f1b", link=FREE, **shape)  # type: ignore[arg-type]
    shared = predict(equal_layers(4), "deepspeed-1f1b", link=FREE, cores=2, **shape)  # type: ignore[arg-type]
    assert shared.step_s == pytest.approx(apart.step_s / 2)
    assert shared.idle_share == pytest.approx(1.0 - 1.0 / 4)


def test_ranks_cannot_share_less_than_a_core() -> None:
    with pytest.raises(ValueError, match="cannot share 0 cores; give 1 or more"):
        predict(
            equal_layers(4),
            "torch-1f1b",
            stages=2,
            replicas=1,
            micro_batches=2,
            global_batch=2,
            link=FREE,
            cores=0,
        )


def test_ranks_that_wait_for_each_other_are_found() -> None:
    there, back = Message("there", 0, 1, seconds=0.0), Message("back", 1, 0, seconds=0.0)
    with pytest.raises(RuntimeError, match="wait for each other forever"):
        replay_times([[Exchange((there,)), Exchange((back,))], [Exchange((back,)), Exchange((there,))]])


# ---- data parallelism -----------------------------------------------------------------------------------------------


def test_ddp_over_a_slow_link_takes_what_its_bytes_take() -> None:
    megabytes = 100
    work = equal_layers(10, parameter_bytes=(10**5 * megabytes,) * 10)
    link = Link(bytes_per_s=1e5)
    step = step_of(work, "ddp", stages=1, replicas=4, link=link)
    sums = 2 * 3 / 4 * megabytes * 1e6 / 1e5
    # from the end of the last layers' backward pass on the link is never free: 10 MB fill the first bucket
    assert step.step_s == pytest.approx(10 * 1.0 + 2.0 + sums, **DIGITS)
    assert step.bytes_per_step == all_reduce_bytes(megabytes * 1e6, ranks=4) == 6 * megabytes * 10**6


def test_ddp_over_a_fast_link_hides_its_sums_but_the_last() -> None:
    size = 30 * 2**20  # each layer fills a bucket
    work = equal_layers(4, parameter_bytes=(size,) * 4)
    one = Link(bytes_per_s=size / 0.5).all_reduce_s(size, ranks=2)
    step = step_of(work, "ddp", stages=1, replicas=2, micro_batches=3, link=Link(bytes_per_s=size / 0.5))
    assert step.step_s == pytest.approx(3 * 12.0 + one, **DIGITS)
    assert step_of(work, "ddp", stages=1, replicas=2, micro_batches=3).idle_share == pytest.approx(0.0, abs=1e-12)


def test_one_process_computes_all_the_time() -> None:
    step = step_of(equal_layers(4, update_s=(0.5,) * 4, overhead_s=0.25), "one-process", stages=1, micro_batches=3)
    assert step.step_s == pytest.approx(3 * 12.25 + 2.0, **DIGITS)
    assert step.idle_share == pytest.approx(0.0, abs=1e-12)
    assert step.bytes_per_step == 0


# ---- decoupled methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contestant", DECOUPLED)
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (4, 1), (4, 8)])
def test_decoupled_stages_of_equal_time_never_idle(contestant: str, stages: int, micro_batches: int) -> None:
    step = step_of(equal_layers(stages), contestant, stages=stages, micro_batches=micro_batches)
    assert step.idle_share == pytest.approx(0.0, abs=1e-12)
    assert step.step_s == pytest.approx(3.0 * micro_batches, **DIGITS)


def with_aux(num_layers: int, *, share: float, parameter_bytes: int = 0, **changes: object) -> Workload:
    """Equal layers, and segments that take a share of one of them."""

    def segment_cost(source: int | None, target: int, size: int) -> SegmentCost:
        return SegmentCost(share * size, 2 * share * size, parameter_bytes=parameter_bytes)

    return equal_layers(num_layers, segment_cost=segment_cost, **changes)


def test_a_tick_lasts_as_long_as_the_slowest_stage_with_its_part_of_the_auxnet() -> None:
    step = step_of(with_aux(4, share=0.1), "dsaux-penalty", stages=4, bounds=[0, 1, 2, 3, 4])
    assert step.step_s == pytest.approx(3.0 * (1 + 3 * 0.1), **DIGITS)  # three segments on the last two stages
    assert step.aux_share == pytest.approx(0.3, **DIGITS)
    busy = sum(3.0 * (1 + count * 0.1) for count in (1, 2, 3, 3)) / 4
    assert step.idle_share == pytest.approx(1 - busy / step.step_s, **DIGITS)


def test_a_balanced_cut_gives_early_stages_more_layers() -> None:
    """13 layers, and 1, 2 and 2 segments as dear as a layer: 18 shared by three."""
    step = step_of(with_aux(13, share=1.0), "dsaux-al", stages=3)
    assert step.bounds == (0, 5, 9, 13)
    assert step.step_s == pytest.approx(18.0, **DIGITS)
    assert step_of(with_aux(12, share=1.0), "torch-1f1b", stages=3, micro_batches=3).bounds == (0, 4, 8, 12)


def test_penalty_knows_nothing_of_the_link_but_by_the_auxnets_sum() -> None:
    work = with_aux(4, share=0.1, parameter_bytes=10**6)
    shape = {"stages": 4, "micro_batches": 2, "bounds": [0, 1, 2, 3, 4]}
    free = step_of(work, "dsaux-penalty", **shape)  # type: ignore[arg-type]
    link = Link(bytes_per_s=1e6, latency_s=0.01)
    slow = step_of(work, "dsaux-penalty", link=link, **shape)  # type: ignore[arg-type]
    figures = 4 * (3 * 3 + 1 + 4)
    assert slow.step_s - free.step_s == pytest.approx(link.all_reduce_s(3e6 + figures, ranks=4), **DIGITS)
    larger = replace(work, activation_bytes=(10**9,) * 4)
    assert step_of(larger, "dsaux-penalty", link=link, **shape).step_s == slow.step_s  # type: ignore[arg-type]


def test_al_hides_a_message_that_fits_into_a_tick_and_waits_for_one_that_does_not() -> None:
    """Three stages of 3 s; a message leaves at a tick's end and is needed 1 s into the next one."""
    work = equal_layers(3, update_s=(0.5,) * 3)
    tick, window = 3.5, 0.5 + 1.0  # the update behind the message, the first forward pass before its use
    figures = 4 * (3 * 2 + 1 + 3)
    for travel in (0.4, 1.4):
        link = Link(bytes_per_s=400 / travel)
        sum_s = link.all_reduce_s(figures, ranks=3)
        step = step_of(work, "dsaux-al", stages=3, link=link)
        assert step.step_s == pytest.approx(max(0.5, sum_s) + 3.0, **DIGITS)
    link = Link(bytes_per_s=400 / 2.5)
    sum_s = link.all_reduce_s(figures, ranks=3)
    assert sum_s < 0.5  # hidden under the update
    step = step_of(work, "dsaux-al", stages=3, link=link)
    # The ranks that wait start late and end late: a tick is the wait longer.
    assert tick < step.step_s <= tick + 2.5 - window + 1e-9
    assert step.bytes_per_step == 2 * 400 + all_reduce_bytes(figures, ranks=3)


def test_a_message_goes_up_under_al_and_down_with_local_losses() -> None:
    work = equal_layers(2)
    link = Link(bytes_per_s=400 / 2.0)
    local = step_of(work, "dsaux-local", stages=2, link=link)
    lagrangian = step_of(work, "dsaux-al", stages=2, link=link)
    assert local.bytes_per_step == pytest.approx(400 + all_reduce_bytes(4 * 3, ranks=2))
    assert lagrangian.bytes_per_step == pytest.approx(400 + all_reduce_bytes(4 * 6, ranks=2))
    # 2 s behind the forward pass are its own backward pass; behind a step there is 1 s, the receiver's forward pass
    assert local.step_s == pytest.approx(3.0 + link.all_reduce_s(4 * 3, ranks=2), **DIGITS)
    assert lagrangian.step_s > local.step_s


def test_a_local_head_costs_its_stage_and_the_last_stage_has_none() -> None:
    work = equal_layers(3, head_cost=lambda cut, size: SegmentCost(0.25, 0.5, update_s=0.125, parameter_bytes=4))
    step = step_of(work, "dsaux-local", stages=3)
    assert step.step_s == pytest.approx(3.0 + 0.75 + 0.125, **DIGITS)
    assert step.aux_share == pytest.approx(0.25, **DIGITS)
    busy = (2 * 3.875 + 3.0) / 3
    assert step.idle_share == pytest.approx(1 - busy / step.step_s, **DIGITS)


def test_boundaries_that_no_segment_reaches_are_not_cut() -> None:
    def segment_cost(source: int | None, target: int, size: int) -> SegmentCost:
        return SegmentCost() if target == 1 else IMPOSSIBLE

    work = equal_layers(4, segment_cost=segment_cost, kinds=(0, 1, 1, 1))
    assert step_of(work, "dsaux-al", stages=2).bounds == (0, 1, 4)
    with pytest.raises(ValueError, match="cannot make the boundaries"):
        step_of(work, "dsaux-al", stages=2, bounds=[0, 2, 4])
    with pytest.raises(ValueError, match="cannot be cut into 3 stages"):
        step_of(work, "dsaux-al", stages=3)


# ---- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 4), (4, 16)])
def test_the_auxnet_pays_below_the_share_that_1f1b_idles(stages: int, micro_batches: int) -> None:
    """Equal stages, a free link, one number of micro-batches: (K-1)/M."""
    work = equal_layers(stages)
    share = break_even_aux_share(
        work,
        devices=stages,
        global_batch=2 * micro_batches,
        link=FREE,
        against=["deepspeed-1f1b"],
        micro_batches=[micro_batches],
    )
    if stages == 2:
        assert share == pytest.approx(1 / micro_batches, **DIGITS)
    # with more stages two replicas of half as many are tried as well, and idle less
    assert share <= (stages - 1) / micro_batches + 1e-9


def test_at_the_break_even_share_both_are_as_fast() -> None:
    shape = {"devices": 2, "global_batch": 16, "link": FREE, "micro_batches": [4]}
    work = equal_layers(2)
    share = break_even_aux_share(work, against=["deepspeed-1f1b"], **shape)  # type: ignore[arg-type]
    dear = with_aux(2, share=share)
    ours = best(list(candidates(dear, contestants=["dsaux-al"], **shape)))  # type: ignore[arg-type]
    theirs = best(list(candidates(dear, contestants=["deepspeed-1f1b"], **shape)))  # type: ignore[arg-type]
    assert ours is not None
    assert theirs is not None
    assert ours.step_s == pytest.approx(theirs.step_s, **DIGITS)


def test_candidates_use_all_devices_and_leave_out_what_cannot_be() -> None:
    found = list(candidates(equal_layers(8), devices=4, global_batch=32, link=FREE))
    assert {its.contestant for its in found} == set(CONTESTANTS)
    for its in found:
        assert its.stages * its.replicas == (1 if its.contestant == "one-process" else 4)
        assert its.global_batch // (its.replicas * its.micro_batches) >= 2
        assert its.is_exact == (its.contestant in EXACT)
    assert not [its for its in found if its.contestant == "deepspeed-dualpipev" and its.micro_batches < 2 * its.stages]
    assert list(candidates(equal_layers(8), devices=4, global_batch=3, link=FREE, contestants=["ddp"])) == []


def test_what_does_not_fit_into_memory_is_not_the_best() -> None:
    found = list(candidates(equal_layers(8), devices=4, global_batch=32, link=FREE))
    least = min(its.memory_bytes for its in found)
    fitting = best(found, memory_bytes=least)
    assert fitting is not None
    assert fitting.memory_bytes == least
    assert best(found, memory_bytes=least - 1) is None


def test_of_equally_fast_ways_the_smallest_is_the_best() -> None:
    found = list(candidates(equal_layers(8), devices=4, global_batch=32, link=FREE, contestants=["dsaux-penalty"]))
    assert len({round(its.step_s, 6) for its in found}) == 1  # nothing but memory tells these micro-batches apart
    smallest = best(found)
    assert smallest is not None
    assert smallest.memory_bytes == min(its.memory_bytes for its in found)


@pytest.mark.parametrize(
    ("contestant", "shape", "words"),
    [
        ("gpipe", {"stages": 2}, 'no contestant "gpipe"'),
        ("ddp", {"stages": 2}, "has one stage"),
        ("one-process", {"stages": 1, "replicas": 2}, "has one replica"),
        ("ddp", {"stages": 1, "replicas": 3, "batch": 4}, "cannot be shared by 3 replicas"),
        ("dsaux-al", {"stages": 5}, "need as many layers"),
        ("dsaux-al", {"stages": 0}, "1 or more"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(contestant: str, shape: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        step_of(equal_layers(4), contestant, **shape)  # type: ignore[arg-type]


# ---- links, times, JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("25GB/s", 25e9),
        ("1000Mbit/s", 125e6),
        ("200 MB/s", 200e6),
        ("100Gbps", 12.5e9),
        ("1.5 GiB/s", 1.5 * 2**30),
        ("800 B/s", 800),
    ],
)
def test_links_are_read(text: str, bytes_per_s: float) -> None:
    assert parse_link(text, latency_s=1e-5) == Link(bytes_per_s, 1e-5)


@pytest.mark.parametrize("text", ["", "fast", "25", "25GB", "0GB/s", "-1GB/s", "25GBs", "1e999GB/s", "nanGB/s"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no speed"):
        parse_link(text)


def test_memory_is_read() -> None:
    assert (parse_memory("80GB"), parse_memory("16 GiB")) == (80 * 10**9, 2**34)
    for text in ("80", "80GB/s", "0GB", "80Gbit"):
        with pytest.raises(ConfigError, match="is no size"):
            parse_memory(text)


def test_sizes_between_two_are_on_the_line_and_beyond_the_largest_in_proportion() -> None:
    work = equal_layers(1, times={2: (LayerTimes(3.0, 6.0),), 8: (LayerTimes(9.0, 18.0),)})
    for size, forward in ((2, 3.0), (4, 5.0), (8, 9.0), (16, 18.0), (1, 2.0)):
        (time,) = work.layer_times(size)
        assert (time.forward_s, time.backward_s) == (pytest.approx(forward), pytest.approx(2 * forward))
    constant = equal_layers(1, times={2: (LayerTimes(3.0, 6.0),), 8: (LayerTimes(3.0, 6.0),)})
    assert constant.layer_times(4)[0].forward_s == pytest.approx(3.0)


@pytest.mark.parametrize(("size", "forward"), [(8, 0.005), (2, 0.00125), (1, 0.000625), (12, 0.0075), (24, 0.0175)])
def test_below_the_smallest_size_times_fall_no_faster_than_in_proportion(size: int, forward: float) -> None:
    """The line through 10 ms at 16 samples and 25 ms at 32 comes to nothing at 5."""
    times = {16: (LayerTimes(0.01, 0.02),) * 4, 32: (LayerTimes(0.025, 0.05),) * 4}
    cost = {n: SegmentCost(its[0].forward_s, its[0].backward_s) for n, its in times.items()}
    for found in (*equal_layers(4, times=times).layer_times(size), mix_costs(cost, size)):
        assert (found.forward_s, found.backward_s) == (pytest.approx(forward), pytest.approx(2 * forward))
    step = step_of(equal_layers(4, times=times), "ddp", stages=1, replicas=2, batch=2 * size)
    assert step.samples_per_s == pytest.approx(2 * size / (4 * 3 * forward))


def test_below_the_smallest_size_nothing_takes_longer_than_there() -> None:
    work = equal_layers(1, times={16: (LayerTimes(0.02, 0.04),), 32: (LayerTimes(0.01, 0.02),)})
    assert work.layer_times(2) == (LayerTimes(0.02, 0.04),)


def test_a_workload_survives_json_with_all_that_was_asked() -> None:
    asked: list[tuple[int | None, int, int]] = []

    def segment_cost(source: int | None, target: int, size: int) -> SegmentCost:
        asked.append((source, target, size))
        return SegmentCost(0.1 * size, 0.2, 0.3, 4, 5) if target < 3 else IMPOSSIBLE

    work = equal_layers(4, segment_cost=segment_cost, kinds=(0, 0, 1, 1), device="a device", overhead_s=0.01)
    first = step_of(work, "dsaux-al", stages=2, micro_batches=2)
    assert len(set(asked)) == len(asked)  # equal boundaries are asked once
    back = from_json(to_json(work))
    assert to_json(back) == to_json(work)
    assert step_of(back, "dsaux-al", stages=2, micro_batches=2) == first
    assert not back.segment(None, 3, 1).is_possible


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "null", "[" * 100_000])
def test_a_file_that_holds_no_times_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read as measured times: .*\. Give a file") as caught:
        from_json(text)
    assert "Error" not in str(caught.value), "the name of a class of Python's says nothing to a user"


def test_a_workload_whose_lists_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a workload of 2 layers"):
        equal_layers(2, update_s=(0.0,))
    with pytest.raises(ValueError, match="no times"):
        equal_layers(2, times={})


def test_a_network_is_measured_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsaux.partition.WARMUP_RUNS", 0)
    monkeypatch.setattr("dsaux.partition.TIMED_RUNS", 1)
    sizes: list[int] = []

    def counted(module: torch.nn.Module, spec: SampleSpec, *, micro_batch_size: int, device: torch.device) -> object:
        sizes.append(micro_batch_size)
        return measure(module, spec, micro_batch_size=micro_batch_size, device=device)

    monkeypatch.setattr("dsaux.partition.measure", counted)
    monkeypatch.setattr("dsaux.plan_measure.measure", counted)
    layers, image = build_layers("resnet8", num_classes=10), SampleSpec((3, 16, 16))
    work = measure_workload(layers, input_spec=image, micro_batch_sizes=[2], device=torch.device("cpu"), timed_up_to=4)
    whole = chain_cost([layer.make for layer in layers], input_spec=image)
    assert sum(work.parameter_bytes) == 4 * whole.parameters
    assert work.activation_bytes[0] == 4 * 16 * 16 * 16
    assert work.activation_bytes[-1] == 4 * 10
    assert len(sizes) == len(layers) + 1  # all layers of resnet8 differ; then all of them together
    assert all(time.forward_s > 0 and time.backward_s > 0 for time in work.layer_times(2))
    assert set(sizes) == {2}
    work.layer_times(64)
    assert set(sizes) == {2, 4}  # a larger micro-batch is scaled from the largest that may be timed
    step = step_of(work, "dsaux-al", stages=2, batch=4)
    assert step.step_s > 0
    assert step.aux_share > 0
    assert work.segment(None, 1, 4).parameter_bytes > 0
    assert not work.segment(3, 1, 4).is_possible or work.kind(3) == work.kind(1)


@pytest.mark.parametrize(
    ("network", "pixels", "classes"), [("resnet20", 32, 10), ("resnet50", 224, 1000), ("wrn16_4", 32, 10)]
)
def test_what_two_layers_keep_is_counted_once_in_a_stage(
    network: str, pixels: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsaux.plan_measure.TIMED_RUNS", 1)
    layers, image = build_layers(network, num_classes=classes), SampleSpec((3, pixels, pixels))
    work = measure_workload(layers, input_spec=image, micro_batch_sizes=[], device=torch.device("cpu"))
    whole = chain_cost([layer.make for layer in layers], input_spec=image)
    assert sum(work.kept_bytes) == 4 * whole.saved_numbers
    back = from_json(to_json(replace(work, times={1: (LayerTimes(1.0, 2.0),) * len(layers)}, measure_size=None)))
    count = len(layers)
    cut = Cut((0, count // 4, count // 2, count - 1, count))
    setting = Setting(back, "dsaux-al", stages=4, replicas=1, micro_batches=1, micro_batch_size=2, link=FREE, cut=cut)
    before = [image, *boundary_specs(layers, input_spec=image)]
    for stage, (first, last) in enumerate(itertools.pairwise(cut.bounds)):
        alone = chain_cost([layer.make for layer in layers[first:last]], input_spec=before[first])
        assert setting.piece(stage).kept_bytes == 2 * 4 * alone.saved_numbers, f"what --dry_run counts, {first}:{last}"


def test_what_the_auxnet_keeps_is_counted_as_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsaux.plan_measure.TIMED_RUNS", 1)
    monkeypatch.setattr("dsaux.partition.WARMUP_RUNS", 0)
    monkeypatch.setattr("dsaux.partition.TIMED_RUNS", 1)
    layers, image = build_layers("resnet8", num_classes=10), SampleSpec((3, 16, 16))
    work = measure_workload(
        layers,
        input_spec=image,
        micro_batch_sizes=[],
        device=torch.device("cpu"),
        make_head=lambda boundary, scores: make_local_head(boundary, scores=scores),
    )
    after = boundary_specs(layers, input_spec=image)
    net = build_aux_net([image, after[0], after[2]])
    chain = chain_cost([functools.partial(copy.deepcopy, segment) for segment in net.segments], input_spec=image)
    kept = work.segment(None, 1, 2).kept_bytes + work.segment(1, 3, 2).kept_bytes
    assert kept == 4 * chain.saved_numbers
    stage = [layer.make for layer in layers[:3]]
    with_head = chain_cost([*stage, lambda: make_local_head(after[2], scores=after[-1])], input_spec=image)
    assert sum(work.kept_bytes[:3]) + work.head(3, 2).kept_bytes == 4 * with_head.saved_numbers


def test_the_auxnet_holds_what_its_own_optimizer_remembers() -> None:
    def segment_cost(source: int | None, target: int, size: int) -> SegmentCost:
        return SegmentCost(parameter_bytes=1000)

    same = equal_layers(2, segment_cost=segment_cost, states_per_parameter=2.0)
    bare = replace(same, aux_states_per_parameter=0.0)
    for contestant, less in (("dsaux-penalty", 2 * 1000), ("dsaux-al", 2 * 1000), ("torch-1f1b", 0)):
        full, spare = (step_of(work, contestant, stages=2, micro_batches=2) for work in (same, bare))
        assert full.memory_bytes - spare.memory_bytes == less, contestant
        assert replace(full, memory_bytes=0) == replace(spare, memory_bytes=0)
        assert step_of(from_json(to_json(bare)), contestant, stages=2, micro_batches=2) == spare


def test_a_file_of_times_without_the_newer_entries_is_still_read() -> None:
    work = equal_layers(2, states_per_parameter=2.0)
    document = json.loads(to_json(work))
    del document["aux_states_per_parameter"]
    for layer in document["layers"]:
        del layer["kept_before_bytes"]
    assert to_json(from_json(json.dumps(document))) == to_json(work)


def test_the_layers_take_together_what_the_whole_network_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = build_layers("resnet8", num_classes=10)

    def known(module: torch.nn.Module, spec: SampleSpec, **shape: object) -> LayerTimes:
        is_whole = isinstance(module, torch.nn.Sequential) and len(module) == len(layers)
        return LayerTimes(15.0, 40.0) if is_whole else LayerTimes(2.0, 4.0)

    monkeypatch.setattr("dsaux.partition.measure", known)
    monkeypatch.setattr("dsaux.plan_measure.measure", known)
    work = measure_workload(
        layers, input_spec=SampleSpec((3, 16, 16)), micro_batch_sizes=[2], device=torch.device("cpu")
    )
    times = work.layer_times(2)
    assert sum(its.forward_s for its in times) == pytest.approx(15.0)
    assert sum(its.backward_s for its in times) == pytest.approx(40.0)
    segment = work.segment(None, 1, 2)  # measured alone as well: it gets the network's factors
    assert segment.forward_s == pytest.approx(2.0 * 15.0 / (2.0 * len(layers)))
    assert segment.backward_s == pytest.approx(4.0 * 40.0 / (4.0 * len(layers)))


def test_what_taking_a_backward_pass_apart_costs_is_counted_for_zero_bubble_pipelines_alone() -> None:
    apart = {1: BackwardSplit(0.75, 0.75)}
    halves, dear = equal_layers(4), equal_layers(4, splits=apart)
    shape = {"stages": 2, "micro_batches": 64}
    assert step_of(dear, "torch-1f1b", **shape) == step_of(halves, "torch-1f1b", **shape)
    cheap, slow = (step_of(work, "torch-zbv", **shape).step_s for work in (halves, dear))
    # A micro-batch takes F + B of a chunk with B = 2 F, and now F + 1.5 B; at the ends a few passes stay whole.
    assert slow / cheap == pytest.approx((1 + 2 * 1.5) / (1 + 2), rel=0.05)


def test_a_split_of_another_size_is_that_of_the_nearest() -> None:
    few, many = BackwardSplit(0.6, 0.6), BackwardSplit(0.5, 0.6)
    work = equal_layers(2, splits={2: few, 64: many})
    assert (work.split(2), work.split(4), work.split(32), work.split(1000)) == (few, few, many, many)
    assert equal_layers(2).split(8) == BackwardSplit(0.5, 0.5)


def test_pytorchs_split_backward_pass_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsaux.plan_split.TIMED_RUNS", 1)
    chain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    split = measure_split(chain, SampleSpec((3, 8, 8)), micro_batch_size=2, device=torch.device("cpu"))
    assert split.input_share > 0
    assert split.weight_share > 0
    assert split != BackwardSplit()
    assert all(parameter.grad is not None for parameter in chain.parameters()), "both parts ran"


def test_neighbours_compute_when_they_are_told_to_and_end_with_their_owner() -> None:
    neighbours = Neighbours(1, threads=1)
    with neighbours.busy(numbers=10**5):
        (process,) = neighbours._processes
        assert process.poll() is None
    with neighbours.busy(numbers=10):  # the same again
        assert [process] == neighbours._processes
    del neighbours
    assert process.wait(timeout=60) != 0  # killed


def test_a_neighbour_ends_when_its_parent_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsaux.plan_neighbours"], input="go 2\n", capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "ready\n")
