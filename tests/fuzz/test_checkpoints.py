"""Damaged checkpoints, the short form of `python -m tests.fuzz --checkpoints 200`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.checkpoint_runs import Base, try_damage

pytestmark = pytest.mark.launch

SEED, NUMBER_OF_DAMAGES = 1, 8


def test_a_run_goes_on_from_a_whole_checkpoint_or_says_what_is_wrong(tmp_path: Path) -> None:
    base = Base.train(tmp_path / "base")
    for number in range(NUMBER_OF_DAMAGES):
        done, outcome, verdict = try_damage(base, tmp_path / str(number), seed=SEED, number=number)
        assert not verdict.is_defect, f"{done.changes}: {verdict.reason}\n{outcome.stderr}"
