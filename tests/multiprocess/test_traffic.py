"""What a step sends: every call that reaches a process group of torch.distributed is counted, whoever makes it."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.distributed

from dsaux.engine import AuxPipelineEngine
from tests.ranks import run_ranks
from tests.small_engine import Case, build

pytestmark = pytest.mark.multiprocess

CALLS = [
    "broadcast",
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "gather",
    "scatter",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "send",
    "recv",
    "recv_anysource",
    "barrier",
]
ZERO_1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


def count_step(case: Case) -> dict[str, Any]:
    """Calls during the last step as {(call, ranks of the group): times}, and who this rank is."""
    engine = build(case)
    data = iter(case.replica_batches(engine.grid.get_data_parallel_rank()))
    for _ in range(case.steps - 1):
        engine.train_batch(data)
    seen: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    originals = {name: getattr(torch.distributed.ProcessGroup, name) for name in CALLS}
    for name, original in originals.items():
        setattr(torch.distributed.ProcessGroup, name, _counting(name, original, seen))
    try:
        engine.train_batch(data)
    finally:
        for name, original in originals.items():
            setattr(torch.distributed.ProcessGroup, name, original)
    return {"calls": dict(seen), "pipe": tuple(engine.grid.pp_group), "data": _data_group(engine)}


def _counting(name: str, original: Any, seen: collections.Counter[tuple[str, tuple[int, ...]]]) -> Any:
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        seen[name, tuple(torch.distributed.get_process_group_ranks(group))] += 1
        return original(group, *args, **kwargs)

    return call


def _data_group(engine: AuxPipelineEngine) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(engine.mpu.get_data_parallel_group()))


@pytest.mark.parametrize("changes", [{}, ZERO_1], ids=["zero-0", "zero-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bounds", [(0, 3, 6), (0, 1, 4, 6)], ids=["2 stages", "3 stages"])
def test_a_penalty_step_sends_the_auxnet_sum_and_nothing_else(
    bounds: tuple[int, ...], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16:
        changes = {**changes, "bf16": {"enabled": True}}
    case = Case(bounds, accumulation=2, steps=3, dtype=torch.float32, changes=changes)
    for rank in run_ranks(count_step, case.world_size, case):
        everyone = tuple(range(case.world_size))
        assert rank["pipe"] == everyone
        across_stages = {call: times for call, times in rank["calls"].items() if len(call[1]) > 1}
        assert across_stages == {("allreduce", everyone): 1}


@pytest.mark.parametrize("changes", [{}, ZERO_1], ids=["zero-0", "zero-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlap"])
def test_a_tick_of_al_sends_one_message_up_each_boundary_besides_the_auxnet_sum(
    changes: dict[str, Any], dtype: torch.dtype, overlap: bool
) -> None:
    changes = {**changes, "dsaux": {"aux": {"overlap": overlap}}}
    if dtype == torch.bfloat16:
        changes["bf16"] = {"enabled": True}
    case = Case((0, 1, 4, 6), "al", accumulation=2, steps=6, dtype=torch.float32, changes=changes)
    sum_of_all = {("allreduce", (0, 1, 2)): 1}
    expected = [
        {("recv", (0, 1)): 1, **sum_of_all},
        {("send", (0, 1)): 1, ("recv", (1, 2)): 1, **sum_of_all},
        {("send", (1, 2)): 1, **sum_of_all},
    ]
    for rank, found in enumerate(run_ranks(count_step, 3, case)):
        assert {call: times for call, times in found["calls"].items() if len(call[1]) > 1} == expected[rank]


@pytest.mark.parametrize("changes", [{}, ZERO_1], ids=["zero-0", "zero-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_tick_of_local_sends_one_message_down_each_boundary_besides_the_sum_of_figures(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16:
        changes = {**changes, "bf16": {"enabled": True}}
    case = Case((0, 1, 4, 6), "local", accumulation=2, steps=6, dtype=torch.float32, changes=changes)
    sum_of_all = {("allreduce", (0, 1, 2)): 1}
    expected = [
        {("send", (0, 1)): 1, **sum_of_all},
        {("recv", (0, 1)): 1, ("send", (1, 2)): 1, **sum_of_all},
        {("recv", (1, 2)): 1, **sum_of_all},
    ]
    for rank, found in enumerate(run_ranks(count_step, 3, case)):
        assert {call: times for call, times in found["calls"].items() if len(call[1]) > 1} == expected[rank]


def test_al_with_replicas_keeps_messages_within_the_replica_and_reductions_within_the_stage() -> None:
    case = Case((0, 3, 6), "al", replicas=2, steps=4, dtype=torch.float32)
    for rank in run_ranks(count_step, 4, case):
        others = dict(rank["calls"])
        assert others.pop(("allreduce", (0, 1, 2, 3))) == 1
        moved = {group for name, group in others if name in ("send", "recv")}
        assert moved == {rank["pipe"]}
        assert {group for name, group in others if name not in ("send", "recv") and len(group) > 1} == {rank["data"]}


@pytest.mark.parametrize("changes", [{}, ZERO_1], ids=["zero-0", "zero-1"])
def test_with_replicas_all_other_calls_stay_within_the_data_group(changes: dict[str, Any]) -> None:
    case = Case((0, 3, 6), replicas=2, steps=3, dtype=torch.float32, changes=changes)
    for rank in run_ranks(count_step, case.world_size, case):
        others = dict(rank["calls"])
        assert others.pop(("allreduce", (0, 1, 2, 3))) == 1
        assert others, "the replicas of a stage must average their gradients"
        assert {group for _, group in others} <= {rank["data"], *((single,) for single in range(4))}
        assert rank["data"] != rank["pipe"]


def test_one_stage_sends_nothing() -> None:
    (rank,) = run_ranks(count_step, 1, Case((0, 6), steps=3))
    assert not {call for call in rank["calls"] if len(call[1]) > 1}


def test_the_counter_sees_the_transfers_of_1f1b() -> None:
    """Control: the same counter on DeepSpeed's own schedule finds its activations, gradients and loss broadcast."""
    first, last = run_ranks(count_step, 2, Case((0, 3, 6), "1f1b", accumulation=2, steps=3))
    for rank in (first, last):
        names = {name for name, _ in rank["calls"]}
        assert {"send", "recv"} <= names
        assert "broadcast" in names, "DeepSpeed hands the loss down from the last stage"
