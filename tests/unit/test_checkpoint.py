"""Checkpoint folders: written whole, verified, found; every damage is recognised and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsaux import checkpoint
from dsaux.checkpoint import (
    CheckpointError,
    clear_partial,
    find_checkpoint,
    has_checkpoint,
    keep_newest,
    partial_folder,
    peek,
    publish,
    verify,
    write_file,
)
from dsaux.config_rules import ConfigError

STATES: dict[str, Any] = {
    "layer_00-model_states.pt": {"weight": torch.arange(1000.0), "name": "stem"},
    "rank_000-states.pt": {"count": 3, "none": None, "list": [1, (2, 3.5)]},
}


class Foreign:
    """An object whose loading would run code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("executed",)


def save(folder: Path, step: int, *, latest: bool = True) -> Path:
    """A checkpoint of two small files."""
    name = f"step_{step:08d}"
    partial_folder(folder, name).mkdir(parents=True)
    entries = [write_file(partial_folder(folder, name) / file, state) for file, state in STATES.items()]
    return publish(folder, name, entries=entries, content=content(step), latest=latest)


def content(step: int) -> dict[str, Any]:
    """What a manifest must say."""
    layout = {"schedule": "al", "stages": 2, "replicas": 1, "micro_batches": 1, "bounds": [0, 2, 6]}
    return {"step": step, "num_layers": 6, "is_drained": True, "layout": layout}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints of a run."""
    folder = tmp_path / "run" / "checkpoint"
    save(folder, 10)
    save(folder, 20)
    return folder


def test_a_checkpoint_is_found_from_the_run_its_folder_and_itself(folder: Path) -> None:
    for path in (folder.parent, folder, folder / "step_00000020"):
        found = find_checkpoint(path)
        assert (found.step, found.path.name, found.skipped) == (20, "step_00000020", ())
        assert found.load("rank_000-states.pt") == STATES["rank_000-states.pt"]
        assert torch.equal(found.load("layer_00-model_states.pt")["weight"], torch.arange(1000.0))
    assert (folder / "latest").read_text() == "step_00000020\n"


def test_the_manifest_names_every_file_and_sha256sum_can_check_it(folder: Path) -> None:
    path = folder / "step_00000020"
    manifest = json.loads((path / "manifest.json").read_text())
    assert {entry["name"] for entry in manifest["files"]} == set(STATES)
    assert all(entry["size_bytes"] == (path / entry["name"]).stat().st_size for entry in manifest["files"])
    assert (path / "manifest.json.sha256").read_text().endswith("  manifest.json\n")


def damages() -> list[Any]:
    """Every file of a checkpoint, damaged in every way."""
    ways: dict[str, Callable[[bytes], bytes | None]] = {
        "cut to half": lambda data: data[: len(data) // 2],
        "cut by a byte": lambda data: data[:-1],
        "empty": lambda data: b"",
        "longer": lambda data: data + b"\n",
        "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
        "byte in the middle": lambda data: (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 64]) + data[len(data) // 2 + 1 :]
        ),
        "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
        "gone": lambda data: None,
    }
    files = [*STATES, "manifest.json", "manifest.json.sha256"]
    return [pytest.param(file, change, id=f"{file}-{way}") for file in files for way, change in ways.items()]


@pytest.mark.parametrize(("file", "change"), damages())
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    folder: Path, file: str, change: Callable[[bytes], bytes | None]
) -> None:
    path = folder / "step_00000020" / file
    data = change(path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.removesuffix(".sha256")):
        verify(folder / "step_00000020")
    found = find_checkpoint(folder)
    assert found.step == 10
    assert len(found.skipped) == 1
    assert "step_00000020" in found.skipped[0]
    with pytest.raises(ConfigError, match="no checkpoint that is whole"):
        find_checkpoint(folder / "step_00000020")


def test_a_file_that_is_altered_after_it_was_verified_is_not_loaded(folder: Path) -> None:
    found = find_checkpoint(folder)
    path = found.path / "rank_000-states.pt"
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(CheckpointError, match="has been altered"):
        found.load("rank_000-states.pt")


@pytest.mark.parametrize("damage", ["gone", "nonsense", "other", "binary"])
def test_without_a_good_latest_file_the_newest_is_taken(folder: Path, damage: str) -> None:
    latest = folder / "latest"
    match damage:
        case "gone":
            latest.unlink()
        case "nonsense":
            latest.write_text("../../etc\n")
        case "other":
            latest.write_text("step_00000099\n")
        case "binary":
            latest.write_bytes(b"\xff\x00\xfe")
    assert find_checkpoint(folder).step == 20


def test_nothing_foreign_is_written_or_loaded(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="holds an object that a checkpoint cannot hold"):
        write_file(tmp_path / "own.pt", {"own": Foreign()})
    # A forged checkpoint, with a manifest that fits it.
    partial = partial_folder(folder, "step_00000030")
    partial.mkdir()
    torch.save(Foreign(), partial / "rank_000-states.pt")
    size_bytes, sha256 = checkpoint._measure(partial / "rank_000-states.pt")
    entry = checkpoint.FileEntry("rank_000-states.pt", size_bytes, sha256)
    publish(folder, "step_00000030", entries=[entry], content=content(30), latest=True)
    with pytest.raises(CheckpointError, match="does not hold plain tensors and numbers"):
        find_checkpoint(folder).load("rank_000-states.pt")
    assert "executed" not in capsys.readouterr().out


def test_an_unfinished_checkpoint_is_not_seen_and_goes_away(folder: Path) -> None:
    partial = partial_folder(folder, "step_00000030")
    partial.mkdir()
    write_file(partial / "layer_00-model_states.pt", STATES["layer_00-model_states.pt"])
    assert find_checkpoint(folder).step == 20
    clear_partial(folder)
    assert not partial.exists()


def test_a_whole_checkpoint_that_latest_does_not_name_is_the_last_resort(folder: Path) -> None:
    save(folder, 30, latest=False)
    for step in (20, 10, 30):
        assert find_checkpoint(folder).step == step
        (folder / f"step_{step:08d}" / "manifest.json").write_text("{}")


def test_a_file_of_another_hosts_disk_is_missed(folder: Path) -> None:
    partial_folder(folder, "step_00000030").mkdir()
    entry = checkpoint.FileEntry("rank_001-states.pt", 10, "0" * 64)
    with pytest.raises(CheckpointError, match="file system that all hosts share"):
        publish(folder, "step_00000030", entries=[entry], content={"step": 30}, latest=True)
    assert find_checkpoint(folder).step == 20


def test_the_newest_are_kept(folder: Path) -> None:
    save(folder, 100)
    save(folder, 30)  # a run that went back from 100 to 20
    keep_newest(folder, 2)
    assert steps_in(folder) == [20, 30, 100]
    keep_newest(folder, 1)
    assert steps_in(folder) == [30, 100]
    assert find_checkpoint(folder).step == 30


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    return sorted(int(item.name.removeprefix("step_")) for item in folder.iterdir() if item.is_dir())


def test_a_step_is_replaced_by_a_newer_checkpoint_of_it_and_never_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 20)
    assert steps_in(folder) == [10, 20]

    rename = Path.rename

    def die_with_the_new_one(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die_with_the_new_one)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 20)
    assert find_checkpoint(folder).path.name == "step_00000020.before"
    monkeypatch.undo()
    clear_partial(folder)
    save(folder, 20)
    assert steps_in(folder) == [10, 20]


def test_a_folder_without_a_checkpoint_says_what_it_should_hold(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    assert peek(tmp_path) is None
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"holds no checkpoint\. Give the folder of a run that has saved one"):
            find_checkpoint(path)


def test_another_format_is_refused(folder: Path) -> None:
    path = folder / "step_00000020"
    document = json.loads((path / "manifest.json").read_text())
    data = json.dumps({**document, "format": 99}).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.json.sha256").write_bytes(checkpoint._seal(data))
    with pytest.raises(CheckpointError, match="has format 99; this version of dsaux reads format 1"):
        verify(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", True),
        ("step", "20"),
        ("num_layers", None),
        ("is_drained", 1),
        ("layout", []),
        ("layout", {"schedule": "al", "stages": 2, "replicas": 1, "micro_batches": 1, "bounds": [0, 6]}),
        ("files", {}),
        ("files", [{"name": "../latest", "size_bytes": 1, "sha256": "0"}]),
        ("files", [{"name": "a"}]),
    ],
)
def test_a_manifest_with_a_wrong_entry_is_refused_although_its_seal_fits(folder: Path, key: str, value: object) -> None:
    path = folder / "step_00000020"
    document = json.loads((path / "manifest.json").read_text())
    data = json.dumps({**document, key: value}).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.json.sha256").write_bytes(checkpoint._seal(data))
    with pytest.raises(CheckpointError, match=f"has a wrong entry '{key}'"):
        verify(path)
    assert find_checkpoint(folder).step == 10
