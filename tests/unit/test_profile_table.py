"""`python -m dsaux.profile`: the table of what the ranks wrote, Eq. 27, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsaux.command import run
from dsaux.profile import OTHER, TERMS
from dsaux.profile_files import FORMAT, PROFILE_FOLDER, read_profile, terms_file, trace_file
from dsaux.profile_table import eq27, main

TERMS_MS = (
    {"data": 1, "aux_forward": 2, "aux_backward": 3, "aux_update": 1, "stage": 40, "transfer": 2, OTHER: 1},
    {"data": 1, "aux_forward": 2, "aux_backward": 3, "aux_update": 3, "stage": 38, "transfer": 2, OTHER: 1},
)


def document(rank: int, **changes: Any) -> dict[str, Any]:
    """What a rank writes."""
    terms = {name: 1e-3 * value for name, value in TERMS_MS[rank].items()}
    return {
        "format": FORMAT,
        "rank": rank,
        "world_size": 2,
        "stage": rank,
        "stages": 2,
        "replica": 0,
        "replicas": 1,
        "schedule": "al",
        "micro_batches": 2,
        "device": "cpu",
        "timed_steps": [11, 12, 13],
        "seconds_per_step": sum(terms.values()),
        "terms": terms,
        "instructions": {},
        "traced_steps": [14, 15, 16],
        "trace": trace_file(rank),
        "environment": {"cpu": "a CPU of this test", "gpus": [], "cores": 2},
        **changes,
    }


def write(folder: Path, **changes: Any) -> Path:
    """A run folder with the profile of two ranks."""
    (folder / PROFILE_FOLDER).mkdir()
    for rank in (0, 1):
        (folder / PROFILE_FOLDER / terms_file(rank)).write_text(json.dumps(document(rank, **changes)))
        (folder / PROFILE_FOLDER / trace_file(rank)).write_text("{}")
    return folder


def test_the_terms_of_the_test_are_all_there_are() -> None:
    assert all(set(terms) == {*TERMS, OTHER} for terms in TERMS_MS)


def test_the_table_has_a_row_a_rank_and_a_column_a_term(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [str(write(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "AuxNet forward" in line)
    for name in ("data", "AuxNet backward", "AuxNet update", "stage's passes", "transfer", "other", "sum"):
        assert name in head
    first = next(line for line in lines if line.split()[:2] == ["0", "0"])
    assert "40.00 (80 %)" in first
    assert first.endswith("50.00")
    assert "al, 2 stages x 1 replica, 2 micro-batches in a step" in lines[0]


def test_below_it_stand_the_speedup_what_it_rests_on_and_how_to_open_the_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, [str(write(tmp_path))]) == 0
    text = capsys.readouterr().out
    assert "1.68 times one device" in text  # (1 + 78) / (1 + 2 + 2 + 3 + 78 / 2)
    assert "the sum of the stages' passes: an estimate" in text
    assert f"{tmp_path}/{PROFILE_FOLDER}" in text
    assert "ui.perfetto.dev" in text
    assert "chrome://tracing" in text
    assert "a CPU of this test, 2 cores" in text


def test_eq27_is_that_of_the_paper(tmp_path: Path) -> None:
    found = eq27(read_profile(write(tmp_path)))
    assert found is not None
    data, forward, backward, update, network = 1.0, 2.0, 3.0, (1 + 3) / 2, 40.0 + 38.0
    assert found.by_terms == pytest.approx((data + network) / (data + update + forward + backward + network / 2))
    assert found.by_step == pytest.approx((data + network) / 50.0)
    assert found.network == pytest.approx(1e-3 * network)


def test_replicas_of_a_stage_are_averaged_and_not_added(tmp_path: Path) -> None:
    folder = write(tmp_path, stages=1, stage=0, replicas=2)
    found = eq27(read_profile(folder))
    assert found is not None
    assert found.network == pytest.approx(1e-3 * (40 + 38) / 2)


@pytest.mark.parametrize("schedule", ["local", "1f1b"])
def test_of_a_schedule_without_an_auxnet_there_is_no_eq27(
    tmp_path: Path, schedule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, [str(write(tmp_path, schedule=schedule))]) == 0
    assert f"not of schedule {schedule}" in capsys.readouterr().out


def test_json_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [str(write(tmp_path)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rank["terms"]["stage"] for rank in found["ranks"]] == pytest.approx([0.040, 0.038])
    assert found["eq27"]["by_terms"] == pytest.approx(79 / 47)
    assert set(found["traces"]) == {"0", "1"}


def test_traces_that_were_removed_or_never_made_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, trace=None, traced_steps=[])
    assert run(main, [str(folder)]) == 0
    assert "the training ended before a step was traced" in capsys.readouterr().out


DAMAGED = {
    "no JSON": "{",
    "no object": "[]",
    "another format": {"format": FORMAT + 1},
    "a term is missing": {"terms": {}},
    "a term is no number": {"terms": {**TERMS_MS[0], "stage": "1"}},
    "a term is no finite number": {"terms": {**TERMS_MS[0], "stage": float("nan")}},
    "a negative number": {"micro_batches": -1},
    "no steps": {"timed_steps": []},
    "a stage too many": {"stage": 2},
    "steps are no list": {"timed_steps": 3},
    "no environment": {"environment": None},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, damage = write(tmp_path), DAMAGED[name]
    path = folder / PROFILE_FOLDER / terms_file(0)
    path.write_text(damage if isinstance(damage, str) else json.dumps(document(0, **damage)))
    assert run(main, [str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} is damaged: ")
    assert said.count("\n") == 1


def test_a_folder_without_a_profile_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [str(tmp_path)]) == 2
    assert "holds no profile" in capsys.readouterr().err
    assert run(main, [str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_rank_that_is_missing_or_of_another_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path)
    second = folder / PROFILE_FOLDER / terms_file(1)
    second.write_text(json.dumps(document(1, timed_steps=[21, 22])))
    assert run(main, [str(folder)]) == 2
    assert f"{second} is of another run" in capsys.readouterr().err
    second.unlink()
    assert run(main, [str(folder)]) == 2
    assert f"{second} is missing: the profile is of 2 ranks" in capsys.readouterr().err


def test_a_wrong_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, []) == 2
    assert capsys.readouterr().err.startswith("error: ")
