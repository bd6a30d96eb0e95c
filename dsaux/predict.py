"""Says what a trained network sees in image files.

python -m dsaux.predict model.onnx cat.jpg dog.png
python -m dsaux.predict runs/quickstart cat.jpg --top 3 --json

The model is a file of any format that `dsaux.export` writes, or a run folder. An image is resized by its shorter side,
cut to the square in its middle and normalised, as the test images of the run were; like there, an orientation in its
EXIF data is not applied.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from dsaux.command import Parser, console, run
from dsaux.config_rules import ConfigError
from dsaux.data.pictures import central_square, misfit
from dsaux.display_text import Column, plain_table, rich_table
from dsaux.model_file import ModelCard, Scorer, read_model
from dsaux.runtime import EXIT_BAD_INPUT

_MODES = {1: "L", 3: "RGB"}
"""PIL's name of an image with so many channels."""


@dataclass(frozen=True)
class Prediction:
    """One class of an image.

    Attributes:
        index: its place among the scores.
        name: its name; None if the data set has none.
        probability: softmax of its score.
    """

    index: int
    name: str | None
    probability: float


def load_predictor(path: Path) -> tuple[ModelCard, Scorer]:
    """What to know of a model, and a function from normalised images to scores.

    Args:
        path: a file that `dsaux.export` wrote, or a run folder.

    Raises:
        ConfigError: if it is neither.
    """
    if path.is_dir():
        from dsaux.trained import load_trained

        trained = load_trained(path)
        for warning in trained.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return trained.card, trained.network
    return read_model(path)


def read_image(path: Path, card: ModelCard) -> Tensor:
    """Read an image file as the network wants it.

    Returns:
        float32, shape (1, C, S, S), S the network's image size.

    Raises:
        ConfigError: if the file cannot be read, or holds no picture, or one that a run refuses, too.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if card.in_channels not in _MODES:
        raise ConfigError(f"the network takes images of {card.in_channels} channels; a picture has 1 or 3.")
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as file:
            if reason := misfit(file, data):
                raise ConfigError(f"{path} {reason}. Convert it, e.g. to a PNG of 8 bits.")
            picture = file.convert(_MODES[card.in_channels])
    except UnidentifiedImageError as error:
        raise _unreadable(path, "it is no picture that PIL knows") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from error
    if card.shorter_side is None:
        square = np.array(ImageOps.fit(picture, (card.image_size, card.image_size), Image.Resampling.BILINEAR))
    else:
        square = central_square(picture, shorter_side=card.shorter_side, image_size=card.image_size)
    pixels = torch.from_numpy(square).reshape(card.image_size, card.image_size, card.in_channels).float()
    normalised = (pixels - torch.tensor(card.mean)) / torch.tensor(card.std)
    return normalised.permute(2, 0, 1).unsqueeze(0).contiguous()


def predict(card: ModelCard, scorer: Scorer, image: Tensor, *, top: int) -> list[Prediction]:
    """The most probable classes of one image, the first one first.

    Args:
        card: of the model.
        scorer: of the model.
        image: as `read_image` gives it.
        top: how many classes; all, where there are fewer.
    """
    with torch.no_grad():
        probabilities = scorer(image)[0].double().softmax(dim=0)
    best = probabilities.topk(min(top, card.num_classes))
    return [
        Prediction(index, card.classes[index] if card.classes else None, probability)
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; an image that cannot be read is named, and the others still get their answer.

    Raises:
        ConfigError: if the command line or the model is wrong.
    """
    arguments = _parse(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which some run folders need, looks for a GPU
    card, scorer = load_predictor(arguments.model)
    if card.vocabulary:
        raise ConfigError(
            f"{arguments.model} is a network for text, and dsaux.predict looks at image files. Use it from Python: "
            "dsaux.export.load_model gives the network, its input are the numbers of the symbols in the file's entry "
            "classes."
        )
    code = 0
    for path in arguments.images:
        try:
            predictions = predict(card, scorer, read_image(path, card), top=arguments.top)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = EXIT_BAD_INPUT
            continue
        if arguments.json:
            print(json.dumps({"image": str(path), "predictions": [asdict(entry) for entry in predictions]}))
        else:
            _show(path, predictions)
    return code


def _unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} cannot be read: {reason}. Give a PNG, JPEG or the like.")


def _show(path: Path, predictions: Sequence[Prediction]) -> None:
    columns = [Column("class", is_text=True), Column("probability")]
    rows = [
        [str(entry.index) if entry.name is None else entry.name, f"{entry.probability:.4f}"] for entry in predictions
    ]
    out = console()
    out.print(Text(str(path), style="bold"), soft_wrap=True)
    if out.is_terminal:
        out.print(rich_table(columns, rows))
    else:
        for line in plain_table(columns, rows):
            out.print(Text(line), soft_wrap=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m dsaux.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="an exported file or a run folder")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each image (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of tables")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        parser.error(f"--top is {arguments.top}; it must be 1 or more")
    return arguments


if __name__ == "__main__":
    sys.exit(run(main))
