"""Channels-last training is the training without it: float64, every schedule, messages and checkpoints included."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsaux.evaluate import classification_sums
from tests.ranks import run_ranks
from tests.small_engine import Case, build, weights

pytestmark = pytest.mark.multiprocess

TOLERANCE = 1e-10  # float64, six steps: convolutions add in another order
BOUNDS = (0, 3, 6)  # an activation of 8 channels and 4 x 4 pixels crosses the cut: a wrong order is a wrong number
CASES = {
    "penalty": Case(BOUNDS, "penalty"),
    "al": Case(BOUNDS, "al"),
    "al, bf16 on the way": Case(BOUNDS, "al", changes={"dsaux": {"aux": {"transport": "bf16"}}}),
    "local": Case(BOUNDS, "local"),
    "1f1b": Case(BOUNDS, "1f1b"),
    "al, two micro-batches": Case(BOUNDS, "al", accumulation=2),
    "1f1b, two micro-batches": Case(BOUNDS, "1f1b", accumulation=2),
    "penalty, two replicas": Case((0, 6), "penalty", replicas=2),
}


def with_channels_last(case: Case) -> Case:
    """The case with the setting."""
    dsaux = case.changes.get("dsaux", {})
    return replace(case, changes={**case.changes, "dsaux": {**dsaux, "run": {"channels_last": True}}})


def train_both(cases: dict[str, Case]) -> dict[str, Any]:
    """Each case without the setting and with it."""
    return {name: (train(case), train(with_channels_last(case))) for name, case in cases.items()}


def train(case: Case) -> dict[str, Any]:
    """Losses, weights, and the sums of an evaluation over two of the batches."""
    engine = build(case)
    convolution = next(module for module in engine.module.modules() if isinstance(module, nn.Conv2d))
    formats = []
    convolution.register_forward_pre_hook(lambda module, inputs: formats.append(_is_last(inputs[0])))
    data = case.replica_batches(engine.grid.get_data_parallel_rank())
    stream = iter(data)
    losses = [float(engine.train_batch(stream)) for _ in range(case.steps)]
    engine.drain()
    engine.module.eval()
    found = engine.forward_chain(iter(data[:2]), classification_sums, num_micro_batches=2)
    parameters = [*engine.module.parameters(), *(engine.aux.parameters)]
    return {
        "losses": losses,
        "evaluation": None if found is None else found.numpy(),
        "inputs": set(formats),
        "parameters": {_is_last(parameter) for parameter in parameters if parameter.ndim == 4 and _tells(parameter)},
        **weights(engine),
    }


def _is_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _tells(tensor: Tensor) -> bool:
    """Whether the two formats differ for a shape."""
    return tensor.shape[1] > 1 and tensor.shape[2:].numel() > 1


@functools.cache
def results() -> list[dict[str, Any]]:
    return run_ranks(train_both, 2, CASES)


@pytest.mark.parametrize("name", CASES)
def test_losses_weights_and_evaluation_are_those_without_it(name: str) -> None:
    for rank in results():
        plain, last = rank[name]
        tolerance = 1e-2 if "bf16" in name else TOLERANCE  # a last bit may round the other way on its way
        np.testing.assert_allclose(last["losses"], plain["losses"], rtol=tolerance)
        for part in ("stage", "aux", "head"):
            assert plain[part].keys() == last[part].keys()
            for key, weight in plain[part].items():
                np.testing.assert_allclose(last[part][key], weight, rtol=tolerance, atol=tolerance)
        if plain["evaluation"] is not None:
            np.testing.assert_allclose(last["evaluation"], plain["evaluation"], rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_inputs_really_have_their_channels_last(name: str) -> None:
    for rank in results():
        plain, last = rank[name]
        assert last["inputs"] == {True}
        assert last["parameters"] == {True}
        assert plain["inputs"] == {False}
        assert plain["parameters"] == {False}


def test_under_zero_the_weights_stay_in_their_flat_tensor() -> None:
    zero = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}
    case = Case(BOUNDS, "al", dtype=torch.float32, changes=zero)
    for plain, last in run_ranks(train_one_way_and_the_other, 2, case):
        assert last["inputs"] == {True}
        np.testing.assert_allclose(last["losses"], plain["losses"], rtol=0.05)  # bf16 has 8 bits


def train_one_way_and_the_other(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(case), train(with_channels_last(case))


@pytest.mark.parametrize("overlap", [False, True])
def test_checkpoints_load_across_the_setting(overlap: bool) -> None:
    case = Case(BOUNDS, "al", steps=8, changes={"dsaux": {"aux": {"overlap": overlap}}})
    with tempfile.TemporaryDirectory() as folder:
        for rank in run_ranks(save_and_load, 2, case, Path(folder)):
            expected, others = rank["never saved"], {name: its for name, its in rank.items() if name != "never saved"}
            assert len(others) == 4
            for name, losses in others.items():
                np.testing.assert_allclose(losses, expected, rtol=TOLERANCE, err_msg=name)


def save_and_load(case: Case, folder: Path) -> dict[str, list[float]]:
    """Losses of the last four steps, behind a checkpoint that was saved and loaded with the setting or without."""
    last = with_channels_last(case)
    found = {}
    for saver, its in (("plain", case), ("last", last)):
        engine = build(its)
        data = iter(case.replica_batches(0))
        for _ in range(4):
            engine.train_batch(data)
        engine.save_checkpoint(folder / saver, "four", drain=False)
        if saver == "plain":
            found["never saved"] = [float(engine.train_batch(data)) for _ in range(4)]
    for saver in ("plain", "last"):
        for loader, its in (("plain", case), ("last", last)):
            engine = build(its)
            engine.load_checkpoint(folder / saver, "four")
            data = iter(case.replica_batches(0)[engine.global_steps :])
            found[f"{saver} to {loader}"] = [float(engine.train_batch(data)) for _ in range(4)]
    return found
