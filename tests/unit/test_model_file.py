"""Model files: what a file says comes back as it was, and a file that is none, or does not fit, is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsaux import ConfigError
from dsaux.model_file import FORMATS, ModelCard, load_model, read_model
from dsaux.models.network import build_network

CARD = ModelCard(
    model="resnet8",
    num_classes=10,
    in_channels=3,
    image_size=16,
    mean=(127.1, 0.1 + 0.2, 1e-9),
    std=(50.0, 60.0, 70.0),
    classes=("café", '"quoted"', *"cdefghij"),
    step=12,
    dsaux_version="0.1.0",
)


def test_a_card_comes_back_from_texts_as_it_was() -> None:
    texts = CARD.to_texts()
    assert all(isinstance(text, str) for text in texts.values())
    assert ModelCard.from_texts(texts, path=Path("model")) == CARD


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_card_comes_back_from_a_file_as_it_was(tmp_path: Path, form: str) -> None:
    FORMATS[form].write(build_network("resnet8", num_classes=10), CARD, tmp_path / "model")
    assert read_model(tmp_path / "model")[0] == CARD


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "begins like none"),
        (b"\x89PNG\r\n\x1a\n", "begins like none"),
        (b"PK\x03\x04 cut", "PyTorch cannot load it"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no entry"),
        (b"\x99\x00\x00\x00\x00\x00\x00\x00{}", "safetensors cannot load it"),
        (b"\x08\x0a garbage", "onnxruntime cannot load it"),
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        read_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "format"),
        ({"std": None}, "wrong type"),
        ({"mean": [1.0]}, "value per channel"),
        ({"classes": ["cat"]}, "name per class"),
        ({"model": "resnet9"}, "resnet8"),
        ({"num_classes": 11, "classes": None}, "wrong shape"),
        ({"state_dict": {}}, "is missing"),
    ],
)
def test_entries_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    FORMATS["torch"].write(build_network("resnet8", num_classes=10), CARD, tmp_path / "model.pt")
    document = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save({**document, **change}, tmp_path / "changed.pt")
    with pytest.raises(ConfigError, match=says):
        load_model(tmp_path / "changed.pt")
