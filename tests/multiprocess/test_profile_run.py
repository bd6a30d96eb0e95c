"""A profiled training: the same to the bit as one that is not, under every schedule, and what it leaves behind."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dsaux.profile import OTHER, TERMS
from dsaux.profile_files import PROFILE_FOLDER, read_profile, trace_file
from dsaux.profile_run import WARM_UP_STEPS, StepProfiler
from tests.ranks import run_ranks
from tests.small_engine import Case, build, train, weights

pytestmark = pytest.mark.multiprocess

BOUNDS = (0, 3, 6)
NUM_STEPS = 3
STEPS = WARM_UP_STEPS + 2 * NUM_STEPS + 2
CASES = {
    "penalty": Case(BOUNDS, "penalty", steps=STEPS),
    "al": Case(BOUNDS, "al", steps=STEPS),
    "al, overlap": Case(BOUNDS, "al", steps=STEPS, changes={"dsaux": {"aux": {"overlap": True}}}),
    "local": Case(BOUNDS, "local", steps=STEPS),
    "1f1b": Case(BOUNDS, "1f1b", steps=STEPS),
    "al, two micro-batches": Case(BOUNDS, "al", accumulation=2, steps=STEPS),
    "1f1b, two micro-batches": Case(BOUNDS, "1f1b", accumulation=2, steps=STEPS),
    "al, a drain among the timed steps": Case(BOUNDS, "al", steps=STEPS + 1, drain_after=(WARM_UP_STEPS + 1,)),
    "al, ends among the timed steps": Case(BOUNDS, "al", steps=NUM_STEPS),
    "al, ends among the traced steps": Case(BOUNDS, "al", steps=NUM_STEPS + 2),
}


def profile_each(cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    """Each case without a profile and with one."""
    return {name: (train(case), train_profiled(case, folder / name)) for name, case in cases.items()}


def train_profiled(case: Case, folder: Path) -> dict[str, Any]:
    """As :func:`tests.small_engine.train`, profiled as the trainer does it."""
    engine = build(case)
    data = iter(case.replica_batches(engine.grid.get_data_parallel_rank()))
    losses, plain = [], engine._INSTRUCTION_MAP
    with StepProfiler(engine, folder=folder, num_steps=NUM_STEPS, num_left=case.steps) as profile:
        for step in range(case.steps):
            with profile.step(step + 1):
                losses.append(float(engine.train_batch(data)))
            assert engine._INSTRUCTION_MAP is plain, "the engine is still timed"
            if profile.is_due:
                profile.write()
            if step + 1 in case.drain_after:
                profile.interrupt()
                engine.drain()
    engine.drain()
    return {"losses": losses, **weights(engine)}


@functools.cache
def results() -> tuple[Path, list[dict[str, Any]], tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory()
    return Path(folder.name), run_ranks(profile_each, 2, CASES, Path(folder.name)), folder


@pytest.mark.parametrize("name", CASES)
def test_a_profile_changes_no_loss_and_no_weight(name: str) -> None:
    for rank in results()[1]:
        plain, profiled = rank[name]
        assert str(plain["losses"]) == str(profiled["losses"])  # NaN where no loss is known yet
        for part in ("stage", "aux", "head"):
            assert plain[part].keys() == profiled[part].keys()
            assert all((plain[part][key] == profiled[part][key]).all() for key in plain[part])


@pytest.mark.parametrize("name", [name for name in CASES if "ends" not in name])
def test_every_rank_leaves_its_terms_and_a_trace_with_the_instructions(name: str) -> None:
    folder, case = results()[0] / name, CASES[name]
    profiles = read_profile(folder)
    assert [its.stage for its in profiles] == [0, 1]
    for rank, its in enumerate(profiles):
        fill = 1 if case.drain_after else 0
        timed = range(WARM_UP_STEPS + 1, WARM_UP_STEPS + 1 + NUM_STEPS + fill)
        assert [step for step in timed if not (fill and step == WARM_UP_STEPS + 2)] == list(its.timed_steps)
        assert len(its.traced_steps) == NUM_STEPS
        assert its.schedule == case.schedule
        assert its.micro_batches == case.accumulation
        assert sum(its.terms.values()) == pytest.approx(its.seconds_per_step)
        assert set(its.terms) == {*TERMS, OTHER}
        assert its.terms["stage"] > 0.0
        assert (its.terms["aux_forward"] > 0.0) == (case.schedule in ("penalty", "al"))
        trace = json.loads((folder / PROFILE_FOLDER / trace_file(rank)).read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        forward = {"1f1b": "ForwardPass", "local": "ReceivedForward"}.get(case.schedule, "LocalForward")
        assert names.count(forward) == NUM_STEPS * case.accumulation


def test_a_training_that_ends_before_writes_what_there_is() -> None:
    short = read_profile(results()[0] / "al, ends among the timed steps")
    assert [its.timed_steps for its in short] == [(2, 3)] * 2, "in the first step stage 0 has no batch"
    assert [its.trace for its in short] == [None] * 2
    longer = read_profile(results()[0] / "al, ends among the traced steps")
    assert [(its.timed_steps, its.traced_steps) for its in longer] == [((2, 3, 4), (5,))] * 2


def test_without_a_profile_nothing_is_written_and_nothing_timed(tmp_path: Path) -> None:
    class Engine:
        _INSTRUCTION_MAP: dict[type, Any] = {}

    profile = StepProfiler(Engine(), folder=tmp_path, num_steps=0, num_left=100)
    with profile, profile.step(1):
        pass
    assert not profile.is_due
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_a_traced_step_leaves_the_terms_and_waits_for_nobody() -> None:
    assert run_ranks(fail_in_the_trace, 1) == [((1,), None)]


def fail_in_the_trace() -> tuple[tuple[int, ...], str | None]:
    """One timed step, and a traced one that raises."""
    engine = build(Case((0, 6), "penalty"))
    data = iter(Case((0, 6), "penalty").replica_batches(0))
    with tempfile.TemporaryDirectory() as name:
        profile = StepProfiler(engine, folder=Path(name), num_steps=1, num_left=2)
        engine.settle = _never
        try:
            with profile:
                with profile.step(1):
                    engine.train_batch(data)
                with profile.step(2):
                    raise RuntimeError("the loss is nan")
        except RuntimeError:
            pass
        (its,) = read_profile(Path(name))
        return its.timed_steps, its.trace


def test_a_disk_that_cannot_be_written_ends_no_training() -> None:
    (problems,) = run_ranks(write_below_a_file, 1)
    (problem,) = problems
    assert problem.startswith("the profile in ")
    assert "cannot be written" in problem


def write_below_a_file() -> list[str]:
    """One timed step whose folder cannot be made."""
    case = Case((0, 6), "penalty")
    engine = build(case)
    with tempfile.NamedTemporaryFile() as file:
        profile = StepProfiler(engine, folder=Path(file.name), num_steps=1, num_left=1)
        with profile.step(1):
            engine.train_batch(iter(case.replica_batches(0)))
        profile.finish()
        profile.write()
    return profile.problems


def _never() -> None:
    raise AssertionError("a message of a rank that is gone never comes")
