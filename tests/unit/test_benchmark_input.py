"""What the benchmarks' command lines refuse: one line and exit code 2, before anything is measured or written."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import aux_cost  # noqa: E402 - scripts, found beside the other benchmarks
import choices  # noqa: E402
import input as input_speed  # noqa: E402
import seeds  # noqa: E402

QUICKSTART = str(ROOT / "ds_configs" / "quickstart.json")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls a script that must refuse its command line; gives its one line. A run that it starts fails the test."""

    def no_run(*_: Any, **__: Any) -> Any:
        pytest.fail("a run was started")

    def refused(script: ModuleType, *arguments: str) -> str:
        monkeypatch.setattr(seeds, "run", no_run)
        monkeypatch.setattr(input_speed, "measure", no_run)
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        assert script.main() == 2
        said = capsys.readouterr()
        assert said.out == ""
        [line] = said.err.splitlines()
        assert line.startswith("error: ")
        return line

    return refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0"], "--stages is 0; it must be a whole number >= 1"),
        (["--stages", "2", "-1"], "--stages is -1"),
        (["--width", "-1"], "--width is -1; it must be a number > 0"),
        (["--width", "nan"], "--width is nan"),
        (["--width", "1e9"], "--width is 1e+09"),
        (["--depth", "0"], "--depth is 0"),
        (["--image_size", "0"], "--image_size is 0"),
    ],
)
@pytest.mark.parametrize("models", [["--model", "resnet8"], []])
def test_numbers_that_mean_no_network_are_refused(
    call: Any, models: list[str], arguments: list[str], message: str
) -> None:
    assert message in call(aux_cost, *models, *arguments)


def test_an_option_of_named_networks_without_any_is_refused(call: Any) -> None:
    assert "--stages has no effect without --model" in call(aux_cost, "--stages", "2")


@pytest.mark.parametrize("script", [choices, seeds])
def test_a_configuration_that_cannot_be_read_starts_no_run(call: Any, script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    line = call(script, "--ds_config", QUICKSTART, "nope.json", "--out", str(out))
    assert "nope.json cannot be read" in line
    assert not out.exists()


def test_overrides_of_every_seed_are_checked_before_the_first(call: Any) -> None:
    assert "dsaux.aux.beta" in call(seeds, "--ds_config", QUICKSTART, "--set", "dsaux.aux.beta=-1")


def test_lines_of_another_configuration_are_found_before_the_first_run(call: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"case": "quickstart", "config_digest": "another"}\n')
    configs = [str(ROOT / "ds_configs" / "quickstart_1f1b.json"), QUICKSTART]
    line = call(choices, "--ds_config", *configs, "--only", "beta", "--out", str(out))
    assert "lines of another quickstart" in line


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_a_data_set_that_is_not_there_is_named_before_another_is_measured(call: Any, name: str, tmp_path: Path) -> None:
    arguments = ["--datasets", "photos", name, "--root", str(tmp_path / "nope"), "--out", str(tmp_path / "out.jsonl")]
    assert f"{tmp_path}/nope" in call(input_speed, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["race", "--out", "a.bmpx"], "--out is a.bmpx; a figure is written as one of .pdf, .png, .svg"),
        (["race", "--data", "nope.jsonl"], "--data has no effect on race"),
        (["choices", "--data", "nope.jsonl"], "--data nope.jsonl is missing or no file"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_not_written(
    call: Any, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    import plot

    monkeypatch.setattr(plot, "FIGURES", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert message in call(plot, *arguments)
    assert list(tmp_path.iterdir()) == []
