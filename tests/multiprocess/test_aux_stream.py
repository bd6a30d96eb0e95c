"""A segment beside the stage gives the numbers of the plain order; float64, on the CPU, where there are no streams."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsaux.stage_graph import StageGraphs
from tests.fake_capture import FakeCapture
from tests.ranks import run_ranks
from tests.small_engine import Case, build, weights

pytestmark = pytest.mark.multiprocess

TOLERANCE = 1e-11  # float64, eight steps: two gradients of a boundary are added up in another order
ASIDE = {"aux_stream": True}
CASES = {
    "penalty": Case((0, 3, 6), "penalty", steps=8),
    "penalty, two micro-batches": Case((0, 3, 6), "penalty", accumulation=2, steps=8),
    "al": Case((0, 3, 6), "al", steps=8, drain_after=(4,)),
    "al, overlap": Case((0, 3, 6), "al", steps=8, changes={"dsaux": {"aux": {"overlap": True}}}),
    "al, unscaled": Case((0, 3, 6), "al", steps=8, changes={"dsaux": {"aux": {"scaled": False}}}),
    "penalty, three stages": Case((0, 2, 4, 6), "penalty", steps=8),
    "al, three stages, two micro-batches": Case((0, 2, 4, 6), "al", accumulation=2, steps=8),
}


def train(case: Case, *, graphed: bool = False) -> dict[str, Any]:
    """Losses, mismatches and weights; and whether a segment ran aside."""
    engine = build(case)
    if graphed:
        engine.stage_graphs = StageGraphs(engine, FakeCapture())
    data = iter(case.replica_batches(0))
    rows = []
    for step in range(case.steps):
        loss = float(engine.train_batch(data))
        rows.append([loss, *engine.boundary_mismatch.tolist(), *engine.boundary_adjoint.tolist()])
        if step + 1 in case.drain_after:
            engine.drain()
    engine.drain()
    captured = 0 if engine.stage_graphs is None else len(engine.stage_graphs.graphs)
    return {"rows": rows, "is aside": engine.aside is not None, "captured": captured, **weights(engine)}


def train_all(cases: dict[str, Case]) -> dict[str, Any]:
    """Each case as it is, with the setting, and with the setting in graphs."""
    found = {}
    for name, case in cases.items():
        block = case.changes.get("dsaux", {})
        aside = replace(case, changes={**case.changes, "dsaux": {**block, "run": ASIDE}})
        found[name] = train(case), train(aside), train(aside, graphed=True)
    return found


@functools.cache
def results(world_size: int) -> list[dict[str, Any]]:
    """Of every rank, the cases that take so many."""
    return run_ranks(train_all, world_size, {name: c for name, c in CASES.items() if c.world_size == world_size})


@pytest.mark.parametrize("name", CASES)
def test_losses_mismatches_and_weights_are_those_of_the_plain_order(name: str) -> None:
    for rank in results(CASES[name].world_size):
        plain, aside, _ = rank[name]
        np.testing.assert_allclose(aside["rows"], plain["rows"], rtol=TOLERANCE, atol=TOLERANCE)
        for part in ("stage", "aux"):
            assert plain[part].keys() == aside[part].keys()
            for key, weight in plain[part].items():
                np.testing.assert_allclose(aside[part][key], weight, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_graphs_change_no_bit_of_it(name: str) -> None:
    for rank in results(CASES[name].world_size):
        _, aside, graphed = rank[name]
        assert graphed["captured"] == 1
        np.testing.assert_array_equal(graphed["rows"], aside["rows"])
        for part in ("stage", "aux"):
            for key, weight in aside[part].items():
                np.testing.assert_array_equal(graphed[part][key], weight)


@pytest.mark.parametrize("name", CASES)
def test_all_stages_but_the_last_have_a_segment_aside(name: str) -> None:
    *before, last = results(CASES[name].world_size)
    assert all(rank[name][1]["is aside"] for rank in before)
    assert not last[name][1]["is aside"]
    assert not any(rank[name][0]["is aside"] for rank in (*before, last))
