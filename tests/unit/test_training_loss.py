"""The loss that training uses: made from the configuration, the same under every schedule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsaux import assemble
from dsaux.config import Config, ConfigError, check_launch, config_from_dict
from dsaux.data import load_dataset
from dsaux.evaluate import classification_sums
from dsaux.partition import Partition
from tests.saved_run import DOCUMENT

SCORES = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


def config(schedule: str = "al", **run: Any) -> Config:
    document = json.loads(json.dumps(DOCUMENT))
    document["dsaux"]["pipeline"]["schedule"] = schedule
    document["dsaux"]["run"].update(run)
    return config_from_dict(document)


def by_hand(smoothing: float) -> Tensor:
    """-(1 - s) log p(label) - s * mean of log p over all classes, the mean over the samples."""
    logs = SCORES - SCORES.exp().sum(dim=1, keepdim=True).log()
    own = torch.stack([logs[row, label] for row, label in enumerate(LABELS)])
    return -((1 - smoothing) * own + smoothing * logs.mean(dim=1)).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_shares_out_the_labels_weight(smoothing: float) -> None:
    loss = assemble.training_loss(config(label_smoothing=smoothing))
    torch.testing.assert_close(loss(SCORES, LABELS), by_hand(smoothing))
    # bf16 scores are summed in float32
    assert loss(SCORES.bfloat16(), LABELS).dtype == torch.float32


def test_the_evaluation_stays_plain() -> None:
    total = classification_sums(SCORES, LABELS)[0]
    torch.testing.assert_close(total / len(LABELS), by_hand(0.0))


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, True, "0.1", None])
def test_a_share_outside_0_to_1_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"dsaux\.run\.label_smoothing is .*a number >= 0 and < 1"):
        config(label_smoothing=value)


class Captured:
    """Stands for the module and the engine: what `build_engine` hands to the module."""

    def __init__(self) -> None:
        self.loss_fn: Any = None

    def module(self, layers: Any, **options: Any) -> None:
        self.loss_fn = options["loss_fn"]

    def initialize(self, **options: Any) -> tuple[None, None, None, None]:
        return None, None, None, None


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Captured]:
    found = Captured()
    monkeypatch.setattr(assemble, "AuxPipelineModule", found.module)
    monkeypatch.setattr(assemble, "initialize", found.initialize)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with torch.random.fork_rng(devices=[]):
        yield found


def build(settings: Config) -> None:
    dataset = load_dataset(settings.dsaux.data)
    layers = assemble.network_layers(settings, dataset)
    partition = Partition((0, 5, 11), (5.0, 6.0), unit="layers", method="bounds")
    launch = check_launch(settings, world_size=2)
    assemble.build_engine(settings, launch, layers=layers, dataset=dataset, partition=partition, main_steps=6)


@pytest.mark.parametrize("schedule", ["penalty", "al", "1f1b"])
def test_every_schedule_has_the_configured_loss(captured: Captured, schedule: str) -> None:
    build(config(schedule, label_smoothing=0.2))
    torch.testing.assert_close(captured.loss_fn(SCORES, LABELS), by_hand(0.2))


def test_dropout_draws_depend_on_seed_and_rank_alone(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for seed, rank in [(0, 0), (0, 0), (0, 1), (1, 0)]:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.rand(5)  # what was drawn before does not matter
        build(config(seed=seed))
        draws.append(tuple(torch.rand(3).tolist()))
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
