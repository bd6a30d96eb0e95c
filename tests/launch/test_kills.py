"""A rank is killed, the run is resumed and ends with the bits of an undisturbed one: tests/kills.py in short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kills import Plan, disturb

pytestmark = pytest.mark.launch


def test_a_run_survives_kills_while_it_trains_and_while_it_saves(tmp_path: Path) -> None:
    plan = Plan("al", epochs=40)
    kills, ends = disturb(plan, count=2, seed=1, folder=tmp_path, kinds=("training", "saving"))
    assert [kill.problem for kill in kills] == [""] * 2
    assert ends
    assert set(ends) == {""}
