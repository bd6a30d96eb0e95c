"""Compiled training is the training without it: float64, every schedule; nothing is compiled anew for an evaluation."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dsaux.evaluate import reestimate_batchnorm
from tests.ranks import run_ranks
from tests.small_engine import Case, build, weights

pytestmark = [pytest.mark.multiprocess, pytest.mark.compile]

TOLERANCE = 1e-9  # float64, four steps: fused kernels add in another order
TIME_LIMIT_S = 600.0  # a C++ compiler on a busy machine
BOUNDS = (0, 3, 6)
CASES = {
    "penalty": Case(BOUNDS, "penalty", steps=4),
    "al, two micro-batches": Case(BOUNDS, "al", accumulation=2, steps=4),
    "local": Case(BOUNDS, "local", steps=4),
    "1f1b": Case(BOUNDS, "1f1b", steps=4),
}


def train_both(cases: dict[str, Case]) -> dict[str, Any]:
    """Each case as it is and compiled."""
    compiled = {"dsaux": {"run": {"compile": True}}}
    return {name: (train(case), train(replace(case, changes=compiled))) for name, case in cases.items()}


def train(case: Case) -> dict[str, Any]:
    """Two steps, a re-estimation of BatchNorm as before an evaluation, two more steps."""
    torch._dynamo.reset()  # each run of a user has a process of its own
    engine, started = build(case), _graphs()
    data = case.replica_batches(0)
    stream = iter(data)
    half = case.steps // 2
    losses = [float(engine.train_batch(stream)) for _ in range(half)]
    counted = _graphs()
    reestimate_batchnorm(engine, iter(data), num_batches=2)
    losses += [float(engine.train_batch(stream)) for _ in range(half)]
    engine.drain()
    aux = getattr(engine.aux.run, "is_compiled", None)
    return {
        "losses": losses,
        "graphs": _graphs() - started,
        "compiled anew": _graphs() - counted,
        "is compiled": (None if engine.module.compiled is None else engine.module.compiled.is_compiled, aux),
        "names": sorted(engine.module.state_dict()),
        **weights(engine),
    }


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@functools.cache
def results() -> list[dict[str, Any]]:
    return run_ranks(train_both, 2, CASES, time_limit_s=TIME_LIMIT_S)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_without_it(name: str) -> None:
    for rank in results():
        plain, compiled = rank[name]
        np.testing.assert_allclose(compiled["losses"], plain["losses"], rtol=TOLERANCE)
        for part in ("stage", "aux", "head"):
            assert plain[part].keys() == compiled[part].keys()
            for key, weight in plain[part].items():
                np.testing.assert_allclose(compiled[part][key], weight, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_stage_and_auxnet_are_compiled_once_and_keep_their_names(name: str) -> None:
    has_aux = CASES[name].schedule in ("penalty", "al")
    for rank in results():
        plain, compiled = rank[name]
        assert plain["is compiled"] == (None, None)
        assert compiled["is compiled"] == (True, True if has_aux else None)
        assert plain["graphs"] == 0
        assert compiled["graphs"] == (2 if has_aux else 1)
        assert compiled["compiled anew"] == 0
        assert compiled["names"] == plain["names"]
        assert not any("_orig_mod" in key for key in compiled["names"])
