"""Several ranks on one GPU: NCCL's messages and sums, CUDA's own graphs beside them, and the numbers of the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dsaux.engine import AuxPipelineEngine
from tests.multiprocess.test_replicas import BF16, ZERO_1
from tests.multiprocess.test_stage_graphs import OVERLAP
from tests.ranks import run_ranks
from tests.small_engine import Case, build, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEPS, DRAINED_AFTER = 12, 7
GRAPHS = {"cuda_graphs": True}
TRANSPORT = {"dsaux": {"aux": {"transport": "bf16"}}}
ASIDE = {"dsaux": {"run": {"aux_stream": True}}}
SINGLE = torch.float32

CASES = {
    "penalty": Case((0, 3, 6), "penalty", accumulation=2),
    "penalty, overlap": Case((0, 3, 6), "penalty", changes=OVERLAP),
    "penalty, bf16": Case((0, 3, 6), "penalty", dtype=SINGLE, changes=BF16),
    "al": Case((0, 3, 6), "al", accumulation=2),
    "al, bf16": Case((0, 3, 6), "al", dtype=SINGLE, changes=BF16),
    "al, bf16 transport": Case((0, 3, 6), "al", dtype=SINGLE, changes=TRANSPORT),
    "local": Case((0, 3, 6), "local", accumulation=2),
    "1f1b": Case((0, 3, 6), "1f1b", accumulation=2),
    "al, 3 stages": Case((0, 2, 4, 6), "al", drain_after=(DRAINED_AFTER,)),
    "penalty, 3 stages": Case((0, 2, 4, 6), "penalty"),
    "local, 3 stages": Case((0, 2, 4, 6), "local"),
    "al, 4 stages": Case((0, 1, 2, 4, 6), "al", accumulation=2),
    "al, 3 stages, AuxNet's stream": Case((0, 2, 4, 6), "al", accumulation=2, changes=ASIDE),
    "penalty, bf16, AuxNet's stream": Case((0, 3, 6), "penalty", dtype=SINGLE, changes={**BF16, **ASIDE}),
    "penalty, 2 replicas": Case((0, 3, 6), "penalty", replicas=2),
    "al, 2 replicas": Case((0, 3, 6), "al", replicas=2),
    "penalty, 2 replicas, ZeRO-1": Case((0, 3, 6), "penalty", replicas=2, dtype=SINGLE, changes=ZERO_1),
}
EAGER_ALWAYS = {"1f1b", "penalty, 2 replicas, ZeRO-1"}


def run(case: Case, *, graphed: bool) -> dict[str, Any]:
    """Train a case; figures of each step, weights, and what was captured."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    block = case.changes.get("dsaux", {})
    changes = (
        {**case.changes, "dsaux": {**block, "run": {**block.get("run", {}), **GRAPHS}}} if graphed else case.changes
    )
    engine = build(replace(case, steps=STEPS, changes=changes))
    told: list[str] = []
    if engine.stage_graphs is not None:
        engine.stage_graphs.tell = told.append
    data = iter(replace(case, steps=STEPS).replica_batches(engine.grid.get_data_parallel_rank()))
    rows = [_step(engine, data, drain=step + 1 in case.drain_after) for step in range(STEPS)]
    engine.drain()
    captured = 0 if engine.stage_graphs is None else len(engine.stage_graphs.graphs)
    return {"rows": rows, **weights(engine), "told": told, "captured": captured, "device": engine.device.type}


def _step(engine: AuxPipelineEngine, data: Any, *, drain: bool) -> list[float]:
    loss = float(engine.train_batch(data))
    row = [loss, *engine.boundary_mismatch.tolist(), *engine.boundary_adjoint.tolist()]
    if drain:
        engine.drain()
    return row


def run_cases(cases: dict[str, Case], graphed: tuple[bool, ...]) -> dict[str, list[dict[str, Any]]]:
    """Each case without graphs, with them, or both."""
    return {name: [run(case, graphed=one) for one in graphed] for name, case in cases.items()}


@functools.cache
def on_gpu(world_size: int) -> list[dict[str, list[dict[str, Any]]]]:
    """Of every rank: each case without and with graphs."""
    cases = {name: case for name, case in CASES.items() if case.world_size == world_size}
    return run_ranks(run_cases, world_size, cases, (False, True), device="cuda", time_limit_s=150.0)


@functools.cache
def on_cpu(world_size: int) -> list[dict[str, list[dict[str, Any]]]]:
    """Of every rank: each float64 case."""
    cases = {
        name: case for name, case in CASES.items() if case.world_size == world_size and case.dtype == torch.float64
    }
    return run_ranks(run_cases, world_size, cases, (False,), time_limit_s=150.0)


@pytest.mark.parametrize("name", CASES)
def test_graphs_beside_messages_change_no_bit(name: str) -> None:
    for rank in on_gpu(CASES[name].world_size):
        eager, graphed = rank[name]
        assert eager["device"] == graphed["device"] == "cuda"
        if name in EAGER_ALWAYS:
            assert graphed["captured"] == 0
        else:
            assert graphed["told"] == []
            assert graphed["captured"] >= 1
        np.testing.assert_array_equal(graphed["rows"], eager["rows"])
        for part in ("stage", "aux", "head"):
            for key, value in eager[part].items():
                assert np.array_equal(graphed[part][key], value), key


NOT_WAITING = [
    name
    for name, case in CASES.items()
    if case.world_size == 2 and case.schedule != "1f1b" and "bf16" not in case.changes  # DeepSpeed reads a norm there
]


def run_without_waits(cases: dict[str, Case]) -> None:
    """Train each case, without and with graphs; where the host waits for the GPU in the last steps PyTorch raises."""
    for case in cases.values():
        for graphed in (False, True):
            blocks = {**case.changes.get("dsaux", {}), "data": {"guard_every": 0}}
            blocks["run"] = {**blocks.get("run", {}), "cuda_graphs": graphed}
            engine = build(replace(case, changes={**case.changes, "dsaux": blocks}))
            data = iter(replace(case, steps=STEPS).replica_batches(0))
            for _ in range(STEPS - 4):
                engine.train_batch(data)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(4):
                    engine.train_batch(data)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            engine.drain()


def test_the_host_waits_for_the_gpu_in_no_step_once_all_stages_have_a_batch() -> None:
    run_ranks(run_without_waits, 2, {name: CASES[name] for name in NOT_WAITING}, device="cuda", time_limit_s=150.0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_a_gpu_trains_what_a_cpu_trains(name: str) -> None:
    size = CASES[name].world_size
    for gpu, cpu in zip(on_gpu(size), on_cpu(size), strict=True):
        one, two = gpu[name][0], cpu[name][0]
        np.testing.assert_allclose(one["rows"], two["rows"], rtol=1e-7, atol=1e-9)
        for part in ("stage", "aux", "head"):
            for key, value in two[part].items():
                np.testing.assert_allclose(one[part][key], value, rtol=1e-6, atol=1e-9, err_msg=str(key))
