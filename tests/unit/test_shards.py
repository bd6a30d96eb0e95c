"""Indices of WebDataset shards: those of DALI's wds2idx, and the command that writes them."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from dsaux.command import run
from dsaux.data.index import main
from dsaux.data.shards import Member, ShardSplit, read_index
from tests.image_files import add


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Two samples, one with a file more, a folder, and a hidden file."""
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in [
            ("deep/1.jpg", b"first"),
            ("deep/1.cls", b"7\n"),
            ("deep/1.seg.png", b"x" * 600),
            (".hidden", b"no"),
            ("2.cls", b"3"),
            ("2.JPG", b"second"),
        ]:
            add(archive, name, data)
    return path


def test_the_command_writes_what_wds2idx_writes(shard: Path, capsys: Any) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    assert run(main, [str(shard)]) == 0
    assert capsys.readouterr().out == f"{shard.with_suffix('.idx')}: 2 samples\n"
    theirs = shard.with_name("theirs.idx")
    with wds2idx.IndexCreator(str(shard), str(theirs), verbose=False) as creator:
        creator.create_index()
    assert shard.with_suffix(".idx").read_text() == theirs.read_text()


def test_any_sample_is_read_at_its_place(shard: Path) -> None:
    run(main, [str(shard)])
    split = ShardSplit([shard])
    assert split.labels.tolist() == [7, 3]
    assert [split.read(index) for index in (1, 0)] == [b"second", b"first"]
    assert split.where(1) == f"2.JPG in {shard}"


def test_an_index_without_names_is_read(shard: Path) -> None:
    run(main, [str(shard)])
    samples = list(read_index(shard))
    lines = [" ".join(f"{m.ending} {m.offset} {m.size}" for m in members) for members in samples]
    shard.with_suffix(".idx").write_text("\n".join(["v1.1 2", *lines]) + "\n")
    assert list(read_index(shard)) == [[Member(*member[:3], "") for member in members] for members in samples]
    assert ShardSplit([shard]).where(1).startswith("at byte ")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "holds no samples"),
        (["a b.jpg"], 'has a member "a b.jpg"; a name must be key.ending, without spaces'),
        (["a"], 'has a member "a"'),
    ],
)
def test_a_shard_that_cannot_have_an_index_is_refused(tmp_path: Path, capsys: Any, names: list[str], says: str) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            add(archive, name, b"1")
    assert run(main, [str(path)]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "says"),
    [("gone.tar", "No such file"), ("text.tar", "cannot be read as a plain tar"), ("x.zip", "does not end in .tar")],
)
def test_what_is_no_shard_is_refused(tmp_path: Path, capsys: Any, name: str, says: str) -> None:
    (tmp_path / "text.tar").write_text("no archive")
    assert run(main, [str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert str(tmp_path / name) in error
    assert len(error.splitlines()) == 1


def test_a_label_that_is_no_class_is_named(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "1.jpg", b"image")
        add(archive, "1.cls", b"cat")
    run(main, [str(path)])
    with pytest.raises(ValueError, match=r'a\.tar, member 1\.cls, holds "cat"; it must be a class'):
        ShardSplit([path])
