"""A run on image files: its network is exported, and a file is seen by `dsaux.predict` as by the run's evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dsaux.command import run
from dsaux.config import ConfigError
from dsaux.data import load_dataset, test_batches
from dsaux.export import export_run
from dsaux.model_file import read_model
from dsaux.predict import main, read_image
from dsaux.trained import load_trained
from tests.image_files import SIZE, deep_png, folder_data, write_tree
from tests.saved_run import random_layers, write_checkpoint, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in tree/, a run on them in run/, its network in model.pt and model.safetensors."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("predict_files")
    write_tree(path / "tree")
    write_checkpoint(write_run(path / "run", "resnet8"), random_layers("resnet8"), step=12)
    file = path / "run/config.json"
    config = json.loads(file.read_text())
    config["dsaux"]["data"] |= {
        "name": "folder",
        "root": str(path / "tree"),
        "image_size": SIZE,
        "train_samples": 40,
        "test_samples": None,
    }
    file.write_text(json.dumps(config))
    for ending in ("pt", "safetensors"):
        export_run(path / "run", path / f"model.{ending}")
    return path


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_the_model_card_says_how_test_images_were_seen(folder: Path, name: str) -> None:
    card, _ = read_model(folder / name)
    assert (card.image_size, card.shorter_side) == (SIZE, 37)
    assert card.classes == tuple(f"n{label:02d}" for label in range(10))
    assert card == load_trained(folder / "run").card


def test_predict_sees_a_file_as_the_evaluation_does(folder: Path) -> None:
    card, _ = read_model(folder / "model.pt")
    dataset = load_dataset(folder_data(folder / "tree"))
    batches = test_batches(dataset, loader="torch", replica=0, num_replicas=1, batch_size=30, device="cpu")
    images, _ = next(iter(batches))
    files = [path for label in sorted((folder / "tree/val").iterdir()) for path in sorted(label.iterdir())]
    seen = torch.cat([read_image(path, card) for path in files])
    assert torch.allclose(seen, images, rtol=0, atol=1e-6)  # order of float32 operations


def test_predict_leaves_the_orientation_of_a_photo_as_the_evaluation_does(folder: Path, tmp_path: Path) -> None:
    card, _ = read_model(folder / "model.pt")
    photo = next(iter(sorted((write_tree(tmp_path / "tree") / "val/n00").iterdir())))
    with Image.open(photo) as file:
        exif, picture = file.getexif(), file.convert("RGB")
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    picture.save(photo, exif=exif)
    dataset = load_dataset(folder_data(tmp_path / "tree"))
    batches = test_batches(dataset, loader="torch", replica=0, num_replicas=1, batch_size=1, device="cpu")
    images, _ = next(iter(batches))
    assert torch.allclose(read_image(photo, card), images, rtol=0, atol=1e-6)  # order of float32 operations


def test_predict_refuses_the_images_that_a_run_refuses(folder: Path, tmp_path: Path) -> None:
    card, _ = read_model(folder / "model.pt")
    (tmp_path / "deep.png").write_bytes(deep_png())
    Image.new("RGB", (90, 50)).save(tmp_path / "turned.tif", tiffinfo={274: 6})
    with pytest.raises(ConfigError, match=r"deep.png has more than 8 bits a channel. Convert it"):
        read_image(tmp_path / "deep.png", card)
    with pytest.raises(ConfigError, match=r"turned.tif is a TIFF of orientation 6 .*upright.* Convert it"):
        read_image(tmp_path / "turned.tif", card)


def test_a_class_is_named_after_its_folder(folder: Path, capsys: Any) -> None:
    image = next((folder / "tree/val/n02").iterdir())
    assert run(main, [str(folder / "model.pt"), str(image), "--json", "--top", "10"]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert sorted(entry["name"] for entry in predictions) == [f"n{label:02d}" for label in range(10)]


def test_a_file_of_an_older_version_is_read_as_before(folder: Path, tmp_path: Path) -> None:
    document = torch.load(folder / "model.pt", weights_only=True)
    del document["shorter_side"]
    torch.save(document, tmp_path / "old.pt")
    card, _ = read_model(tmp_path / "old.pt")
    assert card.shorter_side is None
    pixels = np.random.default_rng(0).integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "exact.png")
    expected = (torch.from_numpy(pixels).float() - torch.tensor(card.mean)) / torch.tensor(card.std)
    assert torch.equal(read_image(tmp_path / "exact.png", card), expected.permute(2, 0, 1)[None])
