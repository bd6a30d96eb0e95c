"""One rank of a host that makes the batches for all: the run is the same as with each rank making its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.small import write_config
from tests.launch.start import events, start_ranks
from tests.launch.test_resume import assert_same_run

pytestmark = pytest.mark.launch


def test_a_run_with_shared_batches_is_the_run_without_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    # Three stages under al, the last epoch exact: the middle stage leaves there. Two micro-batches a step.
    run = {"epochs": 2, "exact_epochs": 1, "max_steps": 12, "checkpoint_every": 6}
    for decode in ("every_rank", "once_per_node"):
        config = write_config(
            tmp_path / f"{decode}.json", run=run, data={"decode": decode}, pipeline={"stages": 3, "partition": [2, 3]}
        )
        document = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**document, "gradient_accumulation_steps": 2}), encoding="utf-8")
        arguments = ["--ds_config", str(config), "--run_dir", str(tmp_path / decode)]
        ranks = start_ranks(arguments, world_size=3, folder=tmp_path / f"log_{decode}")
        assert ranks.wait() == [0, 0, 0], ranks.text()
    assert_same_run(tmp_path / "every_rank", tmp_path / "once_per_node")
    assert len(events(tmp_path / "once_per_node", "step")) == 12
    # From step 6, where the stages have their next batches at different places.
    checkpoint = tmp_path / "once_per_node" / "checkpoint" / "step_00000006"
    arguments = ["--resume", str(checkpoint), "--run_dir", str(tmp_path / "resumed")]
    ranks = start_ranks(arguments, world_size=3, folder=tmp_path / "log_resumed")
    assert ranks.wait() == [0, 0, 0], ranks.text()
    resumed, whole = (
        {event["step"]: event["loss"] for event in events(tmp_path / name, "step")}
        for name in ("resumed", "every_rank")
    )
    assert resumed == {step: loss for step, loss in whole.items() if step > 6}
