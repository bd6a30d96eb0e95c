"""Predict: an image file goes through the network as a test image does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsaux.command import run
from dsaux.data import load_dataset, test_batches
from dsaux.export import export_run
from dsaux.model_file import FORMATS, ModelCard, read_model
from dsaux.predict import main, predict, read_image
from tests.saved_run import chain, random_layers, run_config, write_checkpoint, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its network in all formats, and the first image of its test set as a file."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("predict")
    write_checkpoint(write_run(path / "run", "resnet8"), random_layers("resnet8"), step=12)
    for form in FORMATS:
        export_run(path / "run", path / f"model.{form}", format=form)
    dataset = load_dataset(run_config("resnet8").dsaux.data)
    Image.fromarray(dataset.test_images[0]).save(path / "image.png")
    return path


@pytest.fixture
def card(folder: Path) -> ModelCard:
    return read_model(folder / "model.torch")[0]


def expected_probabilities() -> list[float]:
    """Of the first test image, by the run's own loader and layers."""
    dataset = load_dataset(run_config("resnet8").dsaux.data)
    batches = test_batches(dataset, loader="torch", replica=0, num_replicas=1, batch_size=4, device="cpu")
    images, _ = next(iter(batches))
    return chain(random_layers("resnet8"), images)[0].double().softmax(dim=0).tolist()


@pytest.mark.parametrize("model", ["model.torch", "model.safetensors", "model.onnx", "run"])
def test_an_image_file_gets_the_probabilities_of_the_test_image(folder: Path, capsys: Any, model: str) -> None:
    assert run(main, [str(folder / model), str(folder / "image.png"), "--json", "--top", "20"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    assert answer["image"] == str(folder / "image.png")
    found = {entry["index"]: entry["probability"] for entry in answer["predictions"]}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    # The scores agree to 1e-5 of the largest, and a probability moves by less than they do.
    assert [found[index] for index in range(10)] == pytest.approx(expected_probabilities(), abs=1e-4)


def test_a_table_names_each_image_and_the_best_classes(folder: Path, capsys: Any) -> None:
    images = [str(folder / "image.png")] * 2
    assert run(main, [str(folder / "model.torch"), *images, "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5
    assert lines[0] == images[0]
    assert lines[1].split() == ["class", "probability"]
    best = int(np.argmax(expected_probabilities()))
    assert lines[2].split() == [str(best), f"{max(expected_probabilities()):.4f}"]


def test_classes_are_named_where_names_are_known(card: ModelCard) -> None:
    named = replace(card, classes=tuple("abcdefghij"))
    (best,) = predict(named, lambda images: torch.eye(10)[None, 3], torch.zeros(1, 3, 16, 16), top=1)
    assert (best.index, best.name) == (3, "d")
    assert best.probability == pytest.approx(np.e / (np.e + 9))


def test_an_image_is_resized_by_its_shorter_side_and_cut_to_the_middle(tmp_path: Path, card: ModelCard) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(32, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    small = Image.fromarray(pixels).resize((48, 16), Image.Resampling.BILINEAR).crop((16, 0, 32, 16))
    expected = (torch.from_numpy(np.array(small)).float() - torch.tensor(card.mean)) / torch.tensor(card.std)
    assert torch.equal(read_image(tmp_path / "wide.png", card), expected.permute(2, 0, 1)[None])


def test_grey_images_palettes_and_transparency_become_three_channels(tmp_path: Path, card: ModelCard) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (20, 20)).save(path)
        assert read_image(path, card).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.png", "No such file"),
        (".", "Is a directory"),
        ("text.png", "no picture that PIL knows"),
        ("cut.png", "truncated"),
        ("deep.png", "more than 8 bits"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_and_the_others_are_answered(
    folder: Path, tmp_path: Path, capsys: Any, name: str, says: str
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    data = (folder / "image.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.zeros((20, 20), dtype=np.uint16)).save(tmp_path / "deep.png")
    assert run(main, [str(folder / "model.torch"), str(tmp_path / name), str(folder / "image.png"), "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert str(tmp_path / name) in shown.err
    assert says in shown.err
    assert len(shown.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}/none.pt", "{folder}/image.png"], "cannot be read"),
        (["{folder}/image.png", "{folder}/image.png"], "no model of dsaux"),
        (["{folder}", "{folder}/image.png"], "has no config.json"),
        (["{folder}/model.torch"], "IMAGE"),
        (["{folder}/model.torch", "{folder}/image.png", "--top", "0"], "--top is 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder: Path, capsys: Any, arguments: list[str], says: str) -> None:
    assert run(main, [argument.replace("{folder}", str(folder)) for argument in arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert says in shown


def test_the_module_runs_as_a_command_without_deepspeed(folder: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['deepspeed'] = None; sys.argv[0] = 'predict'; "
        "runpy.run_module('dsaux.predict', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(folder / "model.torch"), str(folder / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "probability" in done.stdout
