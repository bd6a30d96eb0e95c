"""The report: who has a folder and a display, and what the folder holds after a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsaux.config import Config, ConfigError, config_from_dict
from dsaux.report import Report, open_report
from dsaux.runtime import Place

DOCUMENT = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "dsaux": {"pipeline": {"stages": 2}, "model": {"name": "resnet8"}, "run": {"name": "quick"}},
}
PARTITION = SimpleNamespace(bounds=(0, 2, 5), stage_costs=(0.03, 0.01), unit="s", method="time")


@pytest.fixture
def config() -> Config:
    return config_from_dict(DOCUMENT)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def place(rank: int = 0, world_size: int = 2) -> Place:
    return Place(rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size, host=f"node{rank}")


def open_new(config: Config, run_dir: str | None = None, *, rank: int = 0) -> Report:
    return open_report(config, place=place(rank), run_dir=run_dir, eval_only=False)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def engine_of(stage: int) -> Any:
    """As much of an engine as the stage map looks at."""
    module = torch.nn.Linear(3, 4 + stage)
    module.layer_names = [["stem", "block1"], ["block2", "block3", "head"]][stage]  # type: ignore[assignment]
    grid = SimpleNamespace(get_data_parallel_rank=lambda: 0)
    return SimpleNamespace(module=module, stage_id=stage, grid=grid, device=torch.device("cpu"))


def test_rank_0_has_a_folder_and_a_display(config: Config) -> None:
    report = open_new(config)
    assert report.folder is not None
    assert report.folder.path == Path("runs/quick")
    assert report.display is not None
    assert report.display.header == "resnet8, penalty, 2 stages x 1 replica"


def test_the_other_ranks_have_neither_and_write_nothing(config: Config) -> None:
    with open_new(config, rank=1) as report:
        assert report.folder is None
        assert report.display is None
    assert not Path("runs").exists()


def test_the_folder_holds_the_effective_configuration_and_the_environment(config: Config) -> None:
    open_new(config, "here")
    written = json.loads(Path("here/config.json").read_text())
    assert config_from_dict(written) == config
    assert written["dsaux"]["aux"]["beta"] == config.dsaux.aux.beta  # a default, written out
    assert json.loads(Path("here/environment.json").read_text())["world_size"] == 2


def test_a_second_run_in_the_same_given_folder_is_refused(config: Config) -> None:
    open_new(config, "here")
    with pytest.raises(ConfigError, match="--run_dir here holds a run already"):
        open_new(config, "here")


def test_an_empty_run_dir_is_refused_on_every_rank(config: Config) -> None:
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="--run_dir is empty"):
            open_new(config, " ", rank=rank)
    assert not Path("metrics.jsonl").exists()


def test_an_evaluation_adds_to_the_run_and_leaves_its_configuration(config: Config) -> None:
    open_new(config, "here")
    Path("here/checkpoint/step_00000001").mkdir(parents=True)
    Path("here/checkpoint/step_00000001/manifest.json").touch()
    before = Path("here/config.json").read_bytes(), Path("here/environment.json").read_bytes()
    other = config_from_dict({**DOCUMENT, "train_batch_size": 16})
    report = open_report(other, place=place(world_size=4), run_dir="here", eval_only=True)
    assert (Path("here/config.json").read_bytes(), Path("here/environment.json").read_bytes()) == before
    (event,) = events(Path("here"))
    assert event["event"] == "eval_only"
    assert event["environment"]["world_size"] == 4
    assert report.display is not None
    assert "evaluation only, 2 stages x 2 replicas" in report.display.header


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("block", "key", "value"), [("model", "name", "resnet14"), ("data", "test_samples", 99)])
def test_an_evaluation_of_another_network_is_refused_on_every_rank(
    config: Config, rank: int, block: str, key: str, value: object
) -> None:
    open_new(config, "here")
    Path("here/checkpoint/step_00000001").mkdir(parents=True)
    Path("here/checkpoint/step_00000001/manifest.json").touch()
    other = config_from_dict(config.to_dict(), overrides=[f"dsaux.{block}.{key}={value}"])
    with pytest.raises(ConfigError, match=f"dsaux.{block}.{key} is .* but the run in here was trained with"):
        open_report(other, place=place(rank=rank), run_dir="here", eval_only=True)


@pytest.mark.parametrize("run_dir", [None, "nowhere"])
def test_an_evaluation_needs_the_folder_of_a_run(config: Config, run_dir: str | None) -> None:
    with pytest.raises(ConfigError, match="Give th"):
        open_report(config, place=place(), run_dir=run_dir, eval_only=True)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("the loss is nan"), "RuntimeError: the loss is nan"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ConfigError("wrong"), "ConfigError: wrong"),
    ],
)
def test_a_failed_run_says_so_in_its_metrics_and_raises(config: Config, error: BaseException, text: str) -> None:
    with pytest.raises(type(error)), open_new(config, "here"):
        raise error
    assert [(event["event"], event["error"]) for event in events(Path("here"))] == [("failed", text)]


def test_a_run_that_ends_well_has_no_failed_event(config: Config) -> None:
    with open_new(config, "here"):
        pass
    assert events(Path("here")) == []


def test_a_folder_that_vanished_does_not_hide_the_error(config: Config) -> None:
    report = open_new(config, "here")
    Path("here").rename("there")
    with pytest.raises(RuntimeError, match="first"), report:
        raise RuntimeError("first")


def test_the_stage_map_is_gathered_from_all_ranks_then_shown_and_written_by_rank_0(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: dict[int, Any] = {}

    def gather(rows: list[Any], own: Any) -> None:
        sent[own.rank] = own
        for rank, row in sent.items():
            rows[rank] = row

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    open_new(config, rank=1).show_stages(engine_of(1), partition=PARTITION, place=place(1))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    with open_new(config, "here") as report:
        report.show_stages(engine_of(0), partition=PARTITION, place=place(0))  # type: ignore[arg-type]
    (event,) = events(Path("here"))
    assert event["event"] == "stages"
    assert event["bounds"] == [0, 2, 5]
    assert event["stage_costs"] == [0.03, 0.01]
    assert (event["unit"], event["method"]) == ("s", "time")
    assert event["rows"][1] == {
        "rank": 1,
        "host": "node1",
        "device": "cpu",
        "replica": 0,
        "stage": 1,
        "first_layer": "block2",
        "last_layer": "head",
        "parameters": 20,
        "share": 0.25,
    }
    _, header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["%", "of", "time"]
    assert first.split() == ["0", "node0", "cpu", "0", "0", "stem", "..", "block1", "16", "75.0"]
    assert second.split() == ["1", "node1", "cpu", "0", "1", "block2", "..", "head", "20", "25.0"]
