"""The run folder, the throughput and the alarm."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsaux import environment, metrics
from dsaux.config_rules import ConfigError
from dsaux.environment import describe_environment
from dsaux.metrics import (
    MismatchAlarm,
    RunFolder,
    ThroughputMeter,
    check_saved_run,
    create_run_folder,
    open_run_folder,
)


class FakeClock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def events(folder: Path) -> list[dict[str, Any]]:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("module", ["rich", "deepspeed"])
def test_metrics_are_imported_without(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import dsaux.metrics, dsaux.environment"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(metrics.__file__).parents[1])


# ---- events ----


def test_an_event_is_one_json_line_with_its_kind_and_the_seconds_since_the_start(tmp_path: Path) -> None:
    clock = FakeClock()
    folder = RunFolder(tmp_path, clock=clock)
    clock.now += 1.5
    folder.event("step", step=20, loss=1.25, phase="penalty")
    assert events(tmp_path) == [{"event": "step", "time_s": 1.5, "step": 20, "loss": 1.25, "phase": "penalty"}]


def test_events_are_appended_and_can_be_read_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(3):
        folder.event("step", step=step)
        assert [event["step"] for event in events(tmp_path)] == list(range(step + 1))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        ((0.5, math.nan), [0.5, None]),
        ({"a": [math.inf]}, {"a": [None]}),
        (np.float32(0.5), 0.5),
        (np.float64("nan"), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([1.0, np.nan]), [1.0, None]),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(math.nan), None),
        (torch.tensor([1, 2]), [1, 2]),
        (Path("runs") / "a", "runs/a"),
        ("line\nbreak, ü", "line\nbreak, ü"),
        (None, None),
        ({2: True}, {"2": True}),
    ],
)
def test_every_value_becomes_valid_json(tmp_path: Path, value: object, written: object) -> None:
    RunFolder(tmp_path).event("step", value=value)
    assert events(tmp_path)[0]["value"] == written


def test_a_value_that_json_cannot_hold_is_refused_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="RunFolder"):
        RunFolder(tmp_path).event("step", value=RunFolder(tmp_path))


def test_config_and_environment_are_written_indented_and_read_back_equal(tmp_path: Path) -> None:
    folder, document = RunFolder(tmp_path), {"dsaux": {"pipeline": {"stages": 3}}, "lr": 0.1}
    folder.write_config(document)
    folder.write_environment({"host": "node1"})
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text) == document
    assert '\n  "dsaux": {\n' in text
    assert json.loads((tmp_path / "environment.json").read_text()) == {"host": "node1"}


def test_a_configuration_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config({"lr": 0.1})
    with largest_file(2), pytest.raises(OSError, match="File too large"):
        folder.write_config({"lr": 0.2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_who_reads_the_configuration_meanwhile_finds_a_whole_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config({"lr": 0.1})
    with (tmp_path / "config.json").open() as reader:
        folder.write_config({"lr": 0.2})
        assert json.load(reader) == {"lr": 0.1}
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.2}


# ---- full disks ----


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Within the block no file grows beyond so many bytes, as on a disk that is nearly full."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def test_an_event_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        RunFolder(tmp_path).event("stages")


def test_a_run_that_trains_is_told_once_of_a_full_disk_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    folder, told = RunFolder(tmp_path), list[str]()
    folder.go_on_when_full(told.append)
    for step in range(3):
        folder.event("step", step=step)
    assert len(told) == 1
    assert "metrics.jsonl cannot be written: No space left on device" in told[0]


def test_events_go_on_behind_whole_lines_when_there_is_room_again(tmp_path: Path) -> None:
    folder, told = RunFolder(tmp_path), list[str]()
    folder.go_on_when_full(told.append)
    folder.event("step", step=0)
    with largest_file((tmp_path / "metrics.jsonl").stat().st_size + 5):
        folder.event("step", step=1)
        folder.event("step", step=2)
    folder.event("step", step=3)
    assert [event["step"] for event in events(tmp_path)] == [0, 3]
    assert len(told) == 1


def test_an_event_begins_a_line_where_a_run_that_was_killed_left_half_of_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "ste')
    open_run_folder(tmp_path).event("resumed", step=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["step"] == 3


# ---- folders ----


def test_runs_without_a_folder_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [create_run_folder(None, "quick").path for _ in range(3)]
    assert paths == [Path("runs/quick"), Path("runs/quick-2"), Path("runs/quick-3")]
    assert create_run_folder(None, "other").path == Path("runs/other")


def test_a_folder_of_that_name_that_holds_no_run_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quick").mkdir(parents=True)
    assert create_run_folder(None, "quick").path == Path("runs/quick")


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    create_run_folder(tmp_path / "a", "quick").event("final", test_accuracy=0.8)
    with pytest.raises(ConfigError, match=r"holds a run already\. Give another folder, or remove this one"):
        create_run_folder(tmp_path / "a", "quick")
    assert len(events(tmp_path / "a")) == 1


def test_a_folder_with_a_configuration_but_no_metrics_counts_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run already"):
        create_run_folder(tmp_path, "quick")


def test_a_given_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert create_run_folder(path, "quick").path == path
    assert path.is_dir()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ConfigError, match=r"cannot be written: it is a file\. Give --run_dir"):
        create_run_folder(tmp_path / "file", "quick")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        create_run_folder(tmp_path / "file" / "below", "quick")
    assert (tmp_path / "file").read_text() == "keep"


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    # Below /proc not even root can make a folder.
    with pytest.raises(ConfigError, match="the run folder /proc/dsaux cannot be written"):
        create_run_folder(Path("/proc/dsaux"), "quick")


@pytest.mark.parametrize(("made", "reason"), [(False, "is not a folder"), (True, "has no config.json")])
def test_evaluation_needs_the_folder_of_a_run(tmp_path: Path, made: bool, reason: str) -> None:
    path = tmp_path / "a"
    if made:
        path.mkdir()
    with pytest.raises(ConfigError, match=f"{reason}; --eval_only needs the folder of a run that has saved one"):
        check_saved_run(path)
    assert path.exists() == made


def test_evaluation_needs_a_saved_network(tmp_path: Path) -> None:
    folder = create_run_folder(tmp_path / "a", "quick")
    folder.write_config({})
    with pytest.raises(ConfigError, match="has no saved network in checkpoint/"):
        check_saved_run(folder.path)
    (folder.path / "checkpoint" / "step_00000001").mkdir(parents=True)
    (folder.path / "checkpoint" / "step_00000001" / "manifest.json").touch()
    check_saved_run(folder.path)


def test_an_opened_run_keeps_its_events(tmp_path: Path) -> None:
    folder = create_run_folder(tmp_path / "a", "quick")
    folder.write_config({})
    folder.event("final")
    open_run_folder(tmp_path / "a").event("eval")
    assert [event["event"] for event in events(tmp_path / "a")] == ["final", "eval"]


# ---- environment ----


def test_the_environment_names_hardware_versions_and_command() -> None:
    found = describe_environment(world_size=6)
    assert found["world_size"] == 6
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**20
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["versions"]) == {"dsaux", "torch", "torchvision", "deepspeed", "dali", "numpy"}
    assert found["started_utc"].endswith("+00:00")
    assert len(found["gpus"]) == torch.cuda.device_count()
    json.dumps(found, allow_nan=False)


def test_the_commit_is_that_of_the_working_copy_that_holds_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "environment.py"
    file.write_text("one")
    monkeypatch.setattr(environment, "__file__", str(file))
    state = lambda: [describe_environment(world_size=1)[key] for key in ("git_commit", "git_modified")]  # noqa: E731
    assert state() == [None, None]
    git("init", "-q")
    (tmp_path / "other").write_text("x")
    git("add", "other")
    git("commit", "-qm", "other")
    assert state() == [None, None]  # somebody else's repository around an installed package
    git("add", "environment.py")
    git("commit", "-qm", "package")
    assert state() == [git("rev-parse", "HEAD"), False]
    file.write_text("two")
    assert state() == [git("rev-parse", "HEAD"), True]


# ---- throughput ----


def run_steps(meter: ThroughputMeter, clock: FakeClock, seconds: list[float]) -> None:
    for duration in seconds:
        clock.now += duration
        meter.step(100)


def make_meter(warmup_steps: int) -> tuple[ThroughputMeter, FakeClock]:
    clock = FakeClock()
    return ThroughputMeter(warmup_steps, clock=clock), clock


def test_before_the_first_step_the_throughput_is_zero() -> None:
    meter, clock = make_meter(5)
    clock.now += 3
    assert (meter.recent(), meter.overall()) == (0.0, 0.0)


def test_overall_throughput_leaves_out_the_warm_up() -> None:
    meter, clock = make_meter(2)
    run_steps(meter, clock, [50.0, 50.0, 1.0, 3.0])
    assert meter.overall() == pytest.approx(50.0)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_no_longer_than_the_warm_up_reports_what_there_is(steps: int) -> None:
    meter, clock = make_meter(5)
    run_steps(meter, clock, [2.0] * steps)
    assert meter.overall() == pytest.approx(50.0)


def test_recent_throughput_covers_the_last_twenty_steps() -> None:
    meter, clock = make_meter(0)
    run_steps(meter, clock, [10.0] * 5 + [1.0] * 10 + [3.0] * 10)
    assert meter.recent() == pytest.approx(50.0)


def test_paused_time_does_not_count() -> None:
    meter, clock = make_meter(0)
    run_steps(meter, clock, [1.0])
    clock.now += 0.25  # belongs to the second step
    meter.pause()
    clock.now += 1000.0
    meter.pause()
    clock.now += 1000.0
    meter.resume()
    meter.resume()
    run_steps(meter, clock, [0.75])
    assert meter.overall() == pytest.approx(100.0)
    assert meter.recent() == pytest.approx(100.0)


def test_steps_in_no_time_at_all_give_zero_and_no_error() -> None:
    meter, clock = make_meter(0)
    run_steps(meter, clock, [0.0])
    assert (meter.recent(), meter.overall()) == (0.0, 0.0)


# ---- alarm ----


def warnings_at(alarm: MismatchAlarm, lines: list[tuple[float, ...]]) -> list[int]:
    return [line for line, mismatch in enumerate(lines) if alarm.update(mismatch, line)]


def test_the_third_line_running_above_the_threshold_warns_once() -> None:
    assert warnings_at(MismatchAlarm(), [(0.3,)] * 8) == [2]


def test_a_mismatch_of_exactly_the_threshold_does_not_warn() -> None:
    assert warnings_at(MismatchAlarm(), [(0.2,)] * 8) == []


def test_a_line_below_starts_the_count_anew() -> None:
    lines = [(0.3,), (0.3,), (0.1,), (0.3,), (0.3,), (0.3,), (0.3,), (0.1,), (0.3,), (0.3,), (0.3,)]
    assert warnings_at(MismatchAlarm(), lines) == [5, 10]


def test_a_mismatch_that_is_not_a_number_counts_as_too_much() -> None:
    assert warnings_at(MismatchAlarm(), [(math.nan,), (math.inf,), (0.3,)]) == [2]


def test_lines_without_boundaries_say_nothing() -> None:
    assert warnings_at(MismatchAlarm(), [()] * 5) == []


def test_the_warning_names_the_boundary_the_value_and_the_mend() -> None:
    alarm = MismatchAlarm()
    texts = [alarm.update((0.05, 0.34), step) for step in (20, 40, 60)]
    assert texts[:2] == [[], []]
    (text,) = texts[2]
    for word in (
        "between stages 1 and 2",
        "0.340",
        "step 60",
        "dsaux.aux.beta",
        "dsaux.aux.depth",
        "dsaux.aux.width",
    ):
        assert word in text


def test_two_boundaries_warn_apart() -> None:
    alarm = MismatchAlarm(patience=1)
    assert len(alarm.update((0.5, 0.5), 1)) == 2
