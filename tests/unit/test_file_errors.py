"""Image files that are missing, damaged or misplaced: the folder or file is named, and what to do."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dsaux.config import ConfigError, check_launch, config_from_dict
from dsaux.data import check_dataset, load_dataset, sample_counts
from dsaux.data.index import write_index
from dsaux.data.pictures import DamagedImageError
from dsaux.data.shards import ShardSplit, find_shards
from tests.bad_input import REMOVE, good_config
from tests.image_files import deep_png, deep_ppm, deep_tiff, folder_data, with_thumbnail, write_shards, write_tree
from tests.unit.test_files import LOADERS, load, needs, stream_of
from tests.unit.test_stream import take


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree at tree/ and shards with their indices at shards/."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("good")
    write_shards(root / "shards", tree=write_tree(root / "tree"))
    for split in ("train", "val"):
        for shard in find_shards(root / "shards" / split):
            write_index(shard)
    return root


def copy_of(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


TREE_MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no root": (shutil.rmtree, r"there is no folder ROOT \(dsaux.data.root\).* must hold train/<class>/\*.jpg"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "ROOT has no folder train; it must hold"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "ROOT has no folder val or test; it must hold"),
    "no classes": (lambda root: empty(root / "train"), "ROOT/train has no class folders"),
    "empty class": (lambda root: empty(root / "train/n03"), "ROOT/train/n03 holds no image .*Put images there"),
    "class without images": (
        lambda root: [path.rename(path.with_suffix(".txt")) for path in (root / "val/n00").iterdir()],
        "ROOT/val/n00 holds no image",
    ),
    "class in one split": (
        lambda root: shutil.rmtree(root / "val/n04"),
        "ROOT/train has 10 classes and ROOT/val has 9, and they are not the same: n04 only in ROOT/train",
    ),
    "class of another name": (
        lambda root: (root / "val/n04").rename(root / "val/n4"),
        "n04 only in ROOT/train; n4 only in ROOT/val",
    ),
    "one class": (
        lambda root: [shutil.rmtree(root / f"{s}/n{i:02d}") for s in ("train", "val") for i in range(1, 10)],
        "ROOT has 1 class; a classifier needs two",
    ),
}


@pytest.mark.parametrize("name", ["folder", "imagenet"])
@pytest.mark.parametrize("mistake", TREE_MISTAKES)
def test_a_tree_that_is_not_as_it_must_be_is_refused(good: Path, tmp_path: Path, mistake: str, name: str) -> None:
    root = copy_of(good / "tree", tmp_path)
    break_it, says = TREE_MISTAKES[mistake]
    break_it(root)
    with pytest.raises(ConfigError, match=says.replace("ROOT", str(root))):
        check_dataset(folder_data(root, name=name))


def test_the_test_images_may_lie_in_a_folder_test_and_hidden_names_do_not_count(good: Path, tmp_path: Path) -> None:
    root = copy_of(good / "tree", tmp_path)
    (root / "val").rename(root / "test")
    (root / "train/.trash").mkdir()
    (root / "train/n00/._1.JPEG").write_bytes(b"of a Mac")
    (root / "train/n00/notes.txt").write_text("no image")
    check_dataset(folder_data(root))
    assert sample_counts(folder_data(root)) == (60, 30)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"root": None}, "dsaux.data.root is null .* Set it to a folder that has train"),
        ({"root": " "}, 'dsaux.data.root is " "'),
        ({"root": None, "name": "imagenet"}, "there is no folder data/imagenet"),
        ({"train_samples": 61}, r"train_samples is 61 but .*train holds 60 images. Set it to 60 or less"),
        ({"test_samples": 31}, r"test_samples is 31 but .*val holds 30"),
        ({"train_samples": 9}, "train_samples is 9, fewer than the 10 classes"),
        ({"image_size": 15}, r"image_size is 15; folder .* 16 \.\. 1024 .* default 224"),
        ({"color": 0.4, "augment": False}, "color is 0.4 but dsaux.data.augment is false"),
        ({"color": 0.4, "name": "photos", "root": None}, "color is 0.4 but photos has no colour jitter"),
    ],
)
def test_a_setting_that_does_not_fit_the_files_is_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        check_dataset(replace(folder_data(good / "tree"), **change))


def test_a_missing_folder_is_found_before_any_process_group() -> None:
    sets = {"dsaux.data": {"name": "folder", "root": "/no/such", "loader": "torch"}, "scheduler": REMOVE}
    with pytest.raises(ConfigError, match="there is no folder /no/such"):
        check_launch(config_from_dict(good_config(sets)), world_size=2)


def first_shard(root: Path) -> Path:
    return find_shards(root / "train")[0]


def edit_index(root: Path, old: str, new: str) -> None:
    path = first_shard(root).with_suffix(".idx")
    path.write_text(path.read_text().replace(old, new))


def cut(path: Path, *, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


MAKE = "make the index anew: python -m dsaux.data.index ROOT/train/train-0000.tar"
SHARD_MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (
        lambda root: first_shard(root).with_suffix(".idx").unlink(),
        f"the shard ROOT/train/train-0000.tar has no index train-0000.idx beside it. To {MAKE}",
    ),
    "index of another kind": (lambda root: edit_index(root, "v1.2", "v7"), 'train-0000.idx begins with "v7 17"'),
    "empty index": (lambda root: cut(first_shard(root).with_suffix(".idx"), keep=0), 'begins with "";'),
    "cut index": (lambda root: edit_index(root, "v1.2 17", "v1.2 18"), "lists 17 samples but says 18: it is cut off"),
    "no offset": (lambda root: edit_index(root, " 512 ", " ? "), "line 2 of ROOT/train/train-0000.idx .* groups of"),
    "no label": (lambda root: edit_index(root, "cls", "txt"), "line 2 of .*; it must have an image"),
    "cut shard": (lambda root: cut(first_shard(root), keep=0.7), "train-0000.tar has .* bytes, but by line .* cut off"),
    "only one split": (
        lambda root: [path.unlink() for path in (root / "val").iterdir()],
        "one of ROOT/train and ROOT/val has shards",
    ),
}


@pytest.mark.parametrize("mistake", SHARD_MISTAKES)
def test_shards_that_are_not_as_they_must_be_are_refused(good: Path, tmp_path: Path, mistake: str) -> None:
    root = copy_of(good / "shards", tmp_path)
    break_it, says = SHARD_MISTAKES[mistake]
    break_it(root)
    with pytest.raises(ConfigError, match=says.replace("ROOT", str(root))):
        load_dataset(folder_data(root, name="imagenet"))


@pytest.mark.parametrize("layout", ["tree", "shards"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", ["cut in the middle", "cut at the end", "text", "empty", "deep"])
def test_a_damaged_image_is_named(good: Path, tmp_path: Path, damage: str, loader: str, layout: str) -> None:
    needs(loader)
    tree = copy_of(good / "tree", tmp_path)
    victim = tree / "train/n05/2.JPEG"
    if damage.startswith("cut"):
        cut(victim, keep=0.5 if "middle" in damage else 0.97)
    elif damage == "deep":
        Image.new("I;16", (50, 50)).save(victim, "PNG")
    else:
        victim.write_text("no image" if damage == "text" else "")
    root, where = tree, str(victim)
    if layout == "shards":
        root, where = write_shards(tmp_path / "shards", tree=tree), "000032.jpeg in .*/train-0017.tar"
        for split in ("train", "val"):
            for shard in find_shards(root / split):
                write_index(shard)
    stream = stream_of(load(root, name="imagenet"), loader=loader)
    with pytest.raises(DamagedImageError, match=f"the image {where} cannot be used: .* Replace it by a whole copy"):
        take(stream, 6)  # a whole epoch
    stream.close()


def second_picture(image: Image.Image) -> bytes:
    """Two JPEGs in one file, each with an end mark."""
    file = io.BytesIO()
    image.save(file, "MPO", save_all=True, append_images=[image.rotate(180)])
    return file.getvalue()


JPEGS: dict[str, tuple[Callable[[Image.Image], bytes], float]] = {
    "thumbnail": (with_thumbnail, 0.95),
    "progressive": (lambda image: with_thumbnail(image, progressive=True), 0.95),
    "two pictures": (second_picture, 0.47),
    "second picture cut off": (lambda image: second_picture(image)[:-1000], 0.47),
    "bytes behind the end": (lambda image: with_thumbnail(image) + b"\xff\xda and the like", 0.95),
}
"""A JPEG with more than one picture in it, and a share of it that ends shortly before the end of the first one."""


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_jpeg_with_another_in_it_is_taken_whole_and_named_when_cut(
    good: Path, tmp_path: Path, loader: str, kind: str
) -> None:
    needs(loader)
    root = copy_of(good / "tree", tmp_path)
    victim = root / "train/n05/2.JPEG"
    make, share = JPEGS[kind]
    with Image.open(root / "train/n06/1.JPEG") as file:
        data = make(file.resize((100, 400)))  # so high that what is cut out of it for a batch ends before the cut
    victim.write_bytes(data)
    take(stream_of(load(root), loader=loader), 6)  # a whole epoch
    victim.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DamagedImageError, match=f"the image {victim} cannot be used: .* Replace it by a whole copy"):
        take(stream_of(load(root), loader=loader), 6)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_an_image_of_16_bits_a_colour_channel_is_named(good: Path, tmp_path: Path, kind: str, loader: str) -> None:
    needs(loader)
    root = copy_of(good / "tree", tmp_path)
    victim = root / "train/n05/2.JPEG"
    victim.write_bytes({"PNG": deep_png, "TIFF": deep_tiff, "PPM": deep_ppm}[kind]())
    stream = stream_of(load(root), loader=loader)
    says = f"the image {victim} cannot be used: it has more than 8 bits a channel. .*8 bits a channel"
    with pytest.raises(DamagedImageError, match=says):
        take(stream, 6)
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
def test_a_tiff_that_is_not_stored_upright_is_named(
    good: Path, tmp_path: Path, orientation: int | None, loader: str
) -> None:
    needs(loader)
    root = copy_of(good / "tree", tmp_path)
    victim = root / "train/n05/2.JPEG"
    Image.new("RGB", (90, 50)).save(victim, "TIFF", tiffinfo={274: orientation} if orientation else {})
    stream = stream_of(load(root), loader=loader)
    if orientation in (None, 1):
        take(stream, 6)
    else:
        says = f"the image {victim} cannot be used: it is a TIFF of orientation {orientation} .tag 274.; .* upright"
        with pytest.raises(DamagedImageError, match=says):
            take(stream, 6)
    stream.close()


def test_an_image_that_dali_alone_cannot_decode_is_named(good: Path, tmp_path: Path) -> None:
    needs("dali")
    root = copy_of(good / "tree", tmp_path)
    victim = root / "train/n05/2.JPEG"
    Image.new("RGB", (90, 50)).save(victim, "GIF")
    stream = stream_of(load(root), loader="dali")
    with pytest.raises(DamagedImageError, match=f'the image {victim} cannot be used: DALI .* "torch"'):
        take(stream, 6)
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_the_place_of_an_image_in_its_shard_is_looked_up_for_errors_alone(
    good: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    needs(loader)
    stream = stream_of(load(good / "shards", name="imagenet"), loader=loader)

    def fail(*_: Any) -> str:
        raise AssertionError("the index is read again")

    monkeypatch.setattr(ShardSplit, "where", fail)
    take(stream, 6)
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_an_image_that_is_gone_is_named(good: Path, tmp_path: Path, loader: str) -> None:
    needs(loader)
    root = copy_of(good / "tree", tmp_path)
    dataset = load(root)
    (root / "train/n05/2.JPEG").unlink()
    with pytest.raises(DamagedImageError, match=r"n05/2.JPEG cannot be used: No such file"):
        take(stream_of(dataset, loader=loader), 6)


def test_damage_that_only_dali_notices_is_told_as_dali_tells_it(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("dali")
    stream = stream_of(load(good / "tree"), loader="dali")
    take(stream, 1)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stream._loader, "_pipeline", type("Broken", (), {"run": fail})())
    with pytest.raises(RuntimeError, match="out of memory"):
        take(stream, 1)
