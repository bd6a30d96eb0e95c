"""Mistakes in a user's own script, each with one error that names it; and a rank that never comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from dsaux.assemble import cross_entropy
from dsaux.bootstrap import initialize
from dsaux.models import Layer
from dsaux.module import AuxPipelineModule
from tests.ranks import RankError, run_ranks
from tests.small_engine import Case, build, freeze
from tests.small_net import small_aux_net, small_config, small_heads, small_layers

pytestmark = pytest.mark.multiprocess


def module(**changes: Any) -> AuxPipelineModule:
    """A module of two stages, as it should be but for `changes`."""
    arguments: dict[str, Any] = {"num_stages": 2, "bounds": [0, 3, 6], "aux_net": small_aux_net([0, 3, 6])}
    layers = changes.pop("layers", small_layers())
    return AuxPipelineModule(layers, loss_fn=cross_entropy, **{**arguments, **changes})


def frozen(*indices: int) -> list[Layer]:
    """The network with some layers frozen."""
    return [freeze(layer) if index in indices else layer for index, layer in enumerate(small_layers())]


def start(model: Any, **changes: Any) -> Any:
    """Initialize with a right configuration but for `changes`."""
    return initialize(model=model, config=small_config(stages=2, batch=8, accumulation=1, **changes))


SCHEDULER = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": 0.1}}
AL, LOCAL = {"pipeline": {"schedule": "al"}}, {"pipeline": {"schedule": "local"}}
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "bounds that end early": (
        lambda: module(bounds=[0, 3, 5]),
        "bounds [0, 3, 5] do not cut 6 layers into 2 stages; give 3 increasing indices from 0 to 6, e.g. [0, 3, 6].",
    ),
    "an AuxNet for another cut": (
        lambda: module(aux_net=small_aux_net([0, 2, 4, 6])),
        "the AuxNet has 2 segments but 2 stages have 1 boundaries",
    ),
    "heads for another cut": (
        lambda: module(local_heads=small_heads([0, 2, 4, 6])),
        "there are 2 local heads but 2 stages have 1 boundaries",
    ),
    "no heads": (lambda: start(module(), dsaux=LOCAL), "schedule local with 2 stages needs local heads"),
    "no AuxNet": (lambda: start(module(aux_net=None)), "schedule penalty with 2 stages needs an AuxNet"),
    "another kind of model": (lambda: start(nn.Linear(2, 2)), "model is Linear; dsaux.initialize needs"),
    "no configuration": (lambda: initialize(model=module()), "no configuration was given"),
    "a misspelt key": (lambda: start(module(), gradient_cliping=1.0), "Did you mean gradient_clipping?"),
    "a length that train.py alone knows": (
        lambda: start(module(), scheduler=SCHEDULER),
        'total_num_steps is "auto", which train.py alone can fill in',
    ),
    "a first stage that trains nothing": (
        lambda: start(module(layers=frozen(0, 1, 2)), dsaux=AL),
        "stage 0 has no weight to train (requires_grad is False for all of them, or there are none). Give each stage",
    ),
    "a stage that trains nothing, with bf16": (
        lambda: start(module(layers=frozen(3, 4, 5)), bf16={"enabled": True}),
        "stage 1 has no weight to train",
    ),
    "no data": (lambda: start(module())[0].train_batch(), "train_batch has no data"),
    "no data under al": (lambda: start(module(), dsaux=AL)[0].train_batch(), "train_batch has no data"),
    "no AuxNet under al": (lambda: start(module(aux_net=None), dsaux=AL), "schedule al with 2 stages needs an AuxNet"),
}


def messages_of_mistakes() -> dict[str, str]:
    found = {}
    for name, (make, _) in MISTAKES.items():
        try:
            make()
        except Exception as error:
            found[name] = str(error)
    return found


def test_each_mistake_has_an_error_that_names_it() -> None:
    for found in run_ranks(messages_of_mistakes, 2):
        assert set(found) == set(MISTAKES)
        for name, (_, message) in MISTAKES.items():
            assert message in found[name]


def test_a_rank_that_never_comes_ends_the_others_after_the_timeout() -> None:
    case = Case((0, 3, 6), changes={"dsaux": {"run": {"timeout_s": 3}}})
    with pytest.raises(RankError, match=r"rank 0 failed(?s:.*)(?i:timed out|timeout)"):
        run_ranks(train_on_rank_0_alone, 2, case)


def train_on_rank_0_alone(case: Case) -> None:
    engine = build(case)
    if engine.global_rank == 0:
        engine.train_batch(iter(case.replica_batches(0)))
    else:
        threading.Event().wait(60)
