"""Both placements of two stages and two replicas train the same network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsaux.placement import placement_of, topology_of
from tests.ranks import run_ranks
from tests.small_engine import Case, train

pytestmark = pytest.mark.multiprocess

PLACES = {"stages_near": [(0, 0), (0, 1), (1, 0), (1, 1)], "replicas_near": [(0, 0), (1, 0), (0, 1), (1, 1)]}
"""(replica, stage) by rank."""


SCHEDULES = ("penalty", "al", "1f1b")


def train_placed(placement: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """Replica and stage of this rank, and what `train` gives by schedule."""
    found = {}
    for schedule in SCHEDULES:
        topology = topology_of(placement, stages=2, replicas=2)
        assert placement_of(topology) == placement
        case = Case((0, 3, 6), schedule=schedule, replicas=2, accumulation=2, module_options={"topology": topology})
        found[schedule] = train(case)
    at = topology.get_coord(torch.distributed.get_rank())
    return (at.data, at.pipe), found


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[tuple[tuple[int, int], dict[str, Any]]]]:
    """Results by placement, in rank order: starting ranks costs more than training."""
    return {placement: run_ranks(train_placed, 4, placement) for placement in PLACES}


@pytest.mark.parametrize("placement", PLACES)
def test_a_placement_puts_stages_or_replicas_on_neighbouring_ranks(ranks: Any, placement: str) -> None:
    assert [at for at, _ in ranks[placement]] == PLACES[placement]
    for (_, stage), results in ranks[placement]:
        indices = {index for index, _ in results["al"]["stage"]}
        assert indices == ({0, 1, 2} if stage == 0 else {3, 4, 5}) & indices
        assert indices


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_placements_train_to_the_same_losses_and_weights(ranks: Any, schedule: str) -> None:
    """The same sums over other ranks: float64 rounding over five steps, hence 1e-9."""
    near = {at: found[schedule] for at, found in ranks["stages_near"]}
    far = {at: found[schedule] for at, found in ranks["replicas_near"]}
    for at, result in near.items():
        np.testing.assert_allclose(result["losses"], far[at]["losses"], rtol=1e-9)
        assert result["stage"].keys() == far[at]["stage"].keys()
        for key, weight in result["stage"].items():
            np.testing.assert_allclose(weight, far[at]["stage"][key], rtol=1e-7, atol=1e-10)
