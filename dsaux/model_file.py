"""The files that hold a trained network: PyTorch's, safetensors and ONNX, each with all that is needed to use it.

`dsaux.export` writes and checks them, `dsaux.predict` and users' own scripts (`load_model`) read them. A reader goes by
a file's first bytes, not by its name.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dsaux.config import ModelConfig
from dsaux.config_rules import ConfigError, show, suggestion
from dsaux.models import layer_names
from dsaux.models.network import Network, build_network, load_public_state_dict, public_state_dict
from dsaux.models.reference import is_reference
from dsaux.models.shapes import SampleSpec

Scorer: TypeAlias = Callable[[Tensor], Tensor]
"""Normalised images, float32 (B, C, H, W), to class scores, float32 (B, classes); or whole numbers, int64 (B, T), to
scores (B, T, classes)."""

MARK = "dsaux"
"""Value of the entry "format" in every file."""
_TEXTS = ("format", "model", "dsaux_version")


@dataclass(frozen=True)
class ModelCard:
    """What a file says of its network beside the weights.

    Attributes:
        model: name of the network, such as "resnet20", or a user's function, path/to/file.py:function.
        num_classes: number of scores.
        in_channels: channels of an image; 0 for text.
        image_size: height and width of an image; 0 for text.
        mean: subtracted from each channel, in units of 0 .. 255; empty for text.
        std: each channel is divided by it after that, in units of 0 .. 255; empty for text.
        classes: names of the classes in the order of the scores; None if the data set has none.
        step: optimizer steps that the network was trained for.
        dsaux_version: version that wrote the file.
        shorter_side: what an image's shorter side is resized to before its middle is cut out; None stands for
            `image_size`, so that as much of the image as possible is seen.
        args: arguments of a user's function; null for none.
        context: symbols in a sample of text; 0 for images.
        vocabulary: how many symbols text has; 0 for images. `classes` names them.
    """

    model: str
    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    step: int
    dsaux_version: str
    shorter_side: int | None = None
    args: Mapping[str, Any] | None = None
    context: int = 0
    vocabulary: int = 0

    @property
    def input_spec(self) -> SampleSpec:
        """One sample of the network's input: (channels, height, width) of an image, or a row of symbols."""
        if self.vocabulary:
            return SampleSpec((self.context,), causal=True, vocabulary=self.vocabulary)
        return SampleSpec((self.in_channels, self.image_size, self.image_size))

    @property
    def model_config(self) -> ModelConfig:
        """What builds the network."""
        return ModelConfig(name=self.model, args=self.args)

    def to_document(self) -> dict[str, Any]:
        """The card as plain values, with the entry "format"."""
        return {"format": MARK, **asdict(self)}

    def to_texts(self) -> dict[str, str]:
        """The card as strings: names as they are, everything else as JSON."""
        return {key: value if key in _TEXTS else json.dumps(value) for key, value in self.to_document().items()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], *, path: Path) -> ModelCard:
        """Read and check what `to_document` made.

        Raises:
            ConfigError: if the file is not one of dsaux's, or an entry is missing or contradicts another.
        """
        if document.get("format") != MARK:
            raise _not_ours(path, f'it has no entry "format" with the value "{MARK}"')
        document = {**_OPTIONAL, **document}
        missing = [member.name for member in fields(cls) if member.name not in document]
        if missing:
            raise _not_ours(path, f'it has no entry "{missing[0]}"')
        try:
            card = cls(**{member.name: _CASTS[member.name](document[member.name]) for member in fields(cls)})
        except (TypeError, ValueError) as error:
            raise _not_ours(path, f"an entry has the wrong type: {error}") from error
        lengths = {len(card.mean), len(card.std)}
        names = card.num_classes if card.classes is None else len(card.classes)
        if lengths != {card.in_channels} or names != card.num_classes:
            raise _not_ours(path, "mean and std need a value per channel, and classes a name per class")
        if not is_reference(card.model):  # a user's own function is asked when the network is built
            layer_names(card.model)  # refuses what this version does not know
        return card

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], *, path: Path) -> ModelCard:
        """Read and check what `to_texts` made; errors as for `from_document`."""
        try:
            document = {key: text if key in _TEXTS else json.loads(text) for key, text in texts.items()}
        except ValueError as error:
            raise _not_ours(path, f"an entry is not JSON: {error}") from error
        return cls.from_document(document, path=path)


_CASTS: Mapping[str, Callable[[Any], Any]] = {
    "model": str,
    "num_classes": int,
    "in_channels": int,
    "image_size": int,
    "mean": lambda values: tuple(float(value) for value in values),
    "std": lambda values: tuple(float(value) for value in values),
    "classes": lambda names: None if names is None else tuple(str(name) for name in names),
    "step": int,
    "dsaux_version": str,
    "shorter_side": lambda side: None if side is None else int(side),
    "args": lambda block: None if block is None else dict(block),
    "context": int,
    "vocabulary": int,
}
_OPTIONAL: Mapping[str, Any] = {"shorter_side": None, "args": None, "context": 0, "vocabulary": 0}
"""Entries that files of the first versions lack."""


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        ending: how such a file is named.
        to_write: packages that writing and checking it needs beside PyTorch.
        to_read: packages that reading it needs.
        write: `write(network, card, path)`; the network is in eval mode, on the CPU, in float32.
        read: `read(path) -> (card, scorer)`.
        reader: who computes the scores of a file that was read.
    """

    ending: str
    to_write: tuple[str, ...]
    to_read: tuple[str, ...]
    write: Callable[[Network, ModelCard, Path], None]
    read: Callable[[Path], tuple[ModelCard, Scorer]]
    reader: str


def choose_format(name: str | None, out: Path) -> str:
    """The format by its name or, without one, by the ending of the file; its packages must be there.

    Raises:
        ConfigError: if there is no such format or ending, or a package is missing.
    """
    endings = {form.ending: key for key, form in FORMATS.items()} | {".pth": "torch"}
    if name is None:
        if out.suffix not in endings:
            raise ConfigError(
                f"the ending of --out {out} does not say which format is meant. Name the file {', '.join(endings)}, or "
                f"give --format ({', '.join(FORMATS)})."
            )
        name = endings[out.suffix]
    if name not in FORMATS:
        raise ConfigError(f"--format is {show(name)}; there is no such format. {suggestion(name, FORMATS)}")
    _require(FORMATS[name].to_write, f"--format {name}")
    return name


def load_model(path: str | Path) -> nn.Module:
    """The network of a file in the format torch or safetensors, in eval mode on the CPU.

    Its input are images normalised with the mean and std in the file, float32 (B, C, H, W), its output class scores; or
    symbols, int64 (B, T), and scores of the next one. A user's own network is built by the user's function, whose file
    or module must be found from the working directory as when it was trained (an ONNX file needs no function).

    Raises:
        ConfigError: if the file is not there, not one of dsaux's, or an ONNX file.
    """
    _, scorer = read_model(path)
    if not isinstance(scorer, nn.Module):
        raise ConfigError(
            f"{path} is an ONNX file, which is run with onnxruntime. Export the run with --format torch or safetensors "
            "for PyTorch."
        )
    return scorer


def read_model(path: str | Path) -> tuple[ModelCard, Scorer]:
    """What a file of any format says of its network, and a function that computes its scores.

    Raises:
        ConfigError: if the file cannot be read or is not one of dsaux's, or a package is missing.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}. Give a file that exists.") from error
    name = "torch" if start.startswith(b"PK\x03\x04") else "safetensors" if start[8:] == b"{" else "onnx"
    if name == "onnx" and not start.startswith(b"\x08"):  # the version, an ONNX file's first entry
        raise _not_ours(path, "it begins like none of these formats")
    _require(FORMATS[name].to_read, str(path))
    return FORMATS[name].read(path)


# ---- torch ----------------------------------------------------------------------------------------------------------


def _write_torch(network: Network, card: ModelCard, path: Path) -> None:
    torch.save({**card.to_document(), "state_dict": public_state_dict(network, card.model)}, path)


def _read_torch(path: Path) -> tuple[ModelCard, Scorer]:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's own kinds for a cut archive, foreign classes and others
        raise _not_ours(path, f"PyTorch cannot load it: {str(error).splitlines()[0]}") from error
    if not isinstance(document, dict):
        raise _not_ours(path, f"it holds a {type(document).__name__}")
    card = ModelCard.from_document(document, path=path)
    return card, _network_of(card, document.get("state_dict", {}), path=path)


# ---- safetensors ----------------------------------------------------------------------------------------------------


def _write_safetensors(network: Network, card: ModelCard, path: Path) -> None:
    from safetensors.torch import save_file

    state = {key: tensor.contiguous() for key, tensor in public_state_dict(network, card.model).items()}
    save_file(state, path, metadata=card.to_texts())


def _read_safetensors(path: Path) -> tuple[ModelCard, Scorer]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            texts = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise _not_ours(path, f"safetensors cannot load it: {error}") from error
    card = ModelCard.from_texts(texts, path=path)
    return card, _network_of(card, state, path=path)


# ---- onnx -----------------------------------------------------------------------------------------------------------


def _write_onnx(network: Network, card: ModelCard, path: Path) -> None:
    example = card.input_spec.empty(2, device="cpu")
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), _errors_only("onnxscript", "onnx_ir", "torch.onnx"):
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program: Any = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=[card.input_spec.unit],
            output_names=["scores"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine
    program.model.metadata_props.update(card.to_texts())
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> tuple[ModelCard, Scorer]:
    runtime: Any = importlib.import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise _not_ours(path, f"onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
    card = ModelCard.from_texts(session.get_modelmeta().custom_metadata_map, path=path)

    def scores(images: Tensor) -> Tensor:
        (result,) = session.run(["scores"], {card.input_spec.unit: images.numpy()})
        return torch.from_numpy(result)

    return card, scores


@contextlib.contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Within the block these loggers report errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: Mapping[str, Format] = {
    "torch": Format(".pt", (), (), _write_torch, _read_torch, "PyTorch"),
    "safetensors": Format(
        ".safetensors", ("safetensors",), ("safetensors",), _write_safetensors, _read_safetensors, "safetensors"
    ),
    "onnx": Format(".onnx", _ONNX, ("onnxruntime",), _write_onnx, _read_onnx, "onnxruntime"),
}


# ---- parts ----------------------------------------------------------------------------------------------------------


def _network_of(card: ModelCard, state: Mapping[str, Tensor], *, path: Path) -> Network:
    network = build_network(card.model_config, num_classes=card.num_classes, input_spec=card.input_spec)
    try:
        load_public_state_dict(network, state, model=card.model)
    except ValueError as error:
        raise _not_ours(path, str(error)) from error
    return network.eval()


def _not_ours(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} is no model of dsaux: {reason}. Give a file that python -m dsaux.export wrote.")


def _require(packages: tuple[str, ...], what: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. Run: "
            f"pip install {' '.join(missing)}"
        )
