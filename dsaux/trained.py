"""The trained network of a run folder in one process: its layers out of a checkpoint, its BatchNorm, its evaluation.

`dsaux.export` and `dsaux.predict` call `load_trained`. No process group is started and no GPU is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import dsaux
from dsaux.checkpoint import (
    CHECKPOINT_FOLDER,
    CheckpointError,
    FoundCheckpoint,
    find_checkpoint,
    layer_model_file,
)
from dsaux.config import WITHOUT_AUX_NET, Config, load_config
from dsaux.config_rules import ConfigError, suggestion
from dsaux.data import Dataset, load_dataset, test_batches
from dsaux.launch_check import Launch
from dsaux.metrics import CONFIG_FILE, METRICS_FILE
from dsaux.model_file import ModelCard
from dsaux.models.network import Network, build_network

_SAVED_NETWORK = "saved network"  # an evaluation by --eval_only, maybe in another precision than the run's


@dataclass(frozen=True)
class Figures:
    """An evaluation over the whole test set.

    Attributes:
        top1: share of samples whose label has the highest score.
        loss: mean cross-entropy; NaN where it was no finite number.
        samples: number of test samples.
    """

    top1: float
    loss: float
    samples: int


@dataclass(frozen=True, eq=False)
class Trained:
    """A network as a run has trained it.

    Attributes:
        network: in eval mode, float32, on the CPU.
        card: what to know of it.
        config: the run's.
        dataset: the run's samples.
        checkpoint: where the weights come from.
        recorded: the run's own evaluation of these weights; None if there is none on record.
        batchnorm: where BatchNorm's statistics come from, in words.
        warnings: what the user has to know.
    """

    network: Network
    card: ModelCard
    config: Config
    dataset: Dataset
    checkpoint: FoundCheckpoint
    recorded: Figures | None
    batchnorm: str
    warnings: tuple[str, ...]


def load_trained(run_dir: Path, *, checkpoint: str | None = None, reestimate: bool | None = None) -> Trained:
    """Load the network of a run.

    Args:
        run_dir: the run folder.
        checkpoint: name of a checkpoint in it; None takes the newest that is whole.
        reestimate: estimate BatchNorm's statistics anew on training images. By default where the run has not done so
            for this checkpoint: the statistics of its stages are those of the AuxNet's outputs then.

    Raises:
        ConfigError: if this is no run folder, or it has no such checkpoint, or none that is whole.
        CheckpointError: if the checkpoint is of another network than the configuration says.
    """
    config = _read_config(run_dir)
    found = find_checkpoint(run_dir if checkpoint is None else _named_checkpoint(run_dir, checkpoint))
    dataset = load_dataset(config.dsaux.data)
    card = _card_of(config, dataset, step=found.step)
    network = build_network(config.dsaux.model, num_classes=card.num_classes, input_spec=dataset.input_spec)
    load_layers(network, found)
    warnings = list(found.skipped)
    is_drained = bool(found.content.get("is_drained", True))
    if not is_drained:
        warnings.append("The checkpoint was saved with batches under way: its stages are up to K-1 steps apart.")
    recorded = recorded_evaluation(run_dir, found.step) if is_drained else None
    is_evaluated = bool(found.content.get("is_evaluated", recorded is not None))
    batchnorm = "as saved, from the run's own evaluation" if is_evaluated else "as saved, from training"
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        batchnorm = "none in this network"
    elif reestimate or (reestimate is None and not is_evaluated):
        batches = config.dsaux.run.bn_batches
        reestimate_batchnorm(network, config, dataset, replicas=_replicas(found))
        batchnorm = f"estimated anew on {batches} batches of training images"
    elif not is_evaluated and config.dsaux.pipeline.schedule not in WITHOUT_AUX_NET:
        warnings.append("BatchNorm's statistics are those of the AuxNet's outputs. Leave out --no-reestimate.")
    return Trained(network.eval(), card, config, dataset, found, recorded, batchnorm, tuple(warnings))


def _card_of(config: Config, dataset: Dataset, *, step: int) -> ModelCard:
    """What a file says of the network of a run."""
    spec = dataset.input_spec
    channels, height, width = (0, 0, 0) if spec.vocabulary else spec.shape
    assert height == width, "data sets make square images"
    return ModelCard(
        model=config.dsaux.model.name,
        num_classes=dataset.num_classes,
        in_channels=channels,
        image_size=height,
        mean=dataset.mean,
        std=dataset.std,
        classes=dataset.classes,
        step=step,
        dsaux_version=dsaux.__version__,
        shorter_side=dataset.shorter_side,
        args=config.dsaux.model.args,
        context=spec.shape[0] if spec.vocabulary else 0,
        vocabulary=spec.vocabulary,
    )


def load_layers(network: Network, found: FoundCheckpoint) -> None:
    """Put the layer files of a checkpoint into a network; weights become float32.

    Raises:
        CheckpointError: if a file is missing, not what was written, or of another network.
    """
    count = found.content.get("num_layers", len(network.layer_names))
    if count != len(network.layer_names):
        raise CheckpointError(
            f"{found.path} is of a network with {count} layers, the configuration's has {len(network.layer_names)}. "
            f"Give the run folder whose {CONFIG_FILE} it was written with."
        )
    for index, name in enumerate(network.layer_names):
        file = layer_model_file(index)
        state: dict[str, Tensor] = found.load(file)
        plain = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        try:
            network.get_submodule(name).load_state_dict(plain)
        except RuntimeError as error:  # PyTorch's, with the names and shapes that do not fit
            raise CheckpointError(
                f"{found.path / file} does not fit layer {name}: {' '.join(str(error).split())}"
            ) from error


def recorded_evaluation(run_dir: Path, step: int) -> Figures | None:
    """The run's last evaluation after `step` optimizer steps, out of metrics.jsonl; None if there is none."""
    try:
        lines = (run_dir / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event: Any = json.loads(line)
        except ValueError:  # the run was killed while it wrote
            continue
        kind = event.get("event")
        if kind == "eval" and event.get("step") == step and event.get("method") != _SAVED_NETWORK:
            return _figures(event["top1"], event["loss"], event["samples"])
        if kind == "final" and event.get("steps") == step:
            return _figures(event["test_accuracy"], event["test_loss"], event["test_samples"])
    return None


def evaluate_alone(network: Network, dataset: Dataset, *, batch_size: int) -> Figures:
    """Evaluate a network over the whole test set in this process.

    Args:
        network: in eval mode, on the CPU.
        dataset: the images.
        batch_size: images in a batch.
    """
    from dsaux.evaluate import classification_sums

    batches = test_batches(dataset, loader="torch", replica=0, num_replicas=1, batch_size=batch_size, device="cpu")
    total = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for images, labels in batches:
            total += classification_sums(network(images), labels)
    loss, top1, _, samples = total.tolist()
    return Figures(top1=top1 / samples, loss=loss / samples, samples=int(samples))


def reestimate_batchnorm(network: Network, config: Config, dataset: Dataset, *, replicas: int) -> None:
    """Replace BatchNorm's running statistics as the run does before an evaluation, on the same images.

    A run averages over the batches of each replica and then over replicas: the average over all batches, as here.

    Args:
        network: on the CPU.
        config: the run's; the images come by the loader torch.
        dataset: the images.
        replicas: of the run.
    """
    from dsaux.assemble import batchnorm_stream

    stages, num_batches = config.dsaux.pipeline.stages, config.dsaux.run.bn_batches
    data = replace(config.dsaux.data, loader="torch", workers=0)
    config = replace(config, dsaux=replace(config.dsaux, data=data))
    size = max(1, min(config.dsaux.run.eval_batch_size, dataset.num_train // replicas))
    launch = Launch(stages * replicas, stages, replicas, size * replicas, size, 1)
    network.eval()
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's cumulative average
        layer.train()
    for replica in range(replicas):
        stream = batchnorm_stream(config, launch, dataset=dataset, replica=replica, device=torch.device("cpu"))
        _forward(network, (next(stream)[0] for _ in range(num_batches)))
        stream.close()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.eval()


def _forward(network: Network, batches: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for images in batches:
            network(images)


def _figures(top1: float, loss: float | None, samples: int) -> Figures:
    return Figures(top1, math.nan if loss is None else loss, samples)


def _replicas(found: FoundCheckpoint) -> int:
    return int(found.content.get("layout", {}).get("replicas", 1))


def _read_config(run_dir: Path) -> Config:
    if not (run_dir / CONFIG_FILE).is_file():
        state = f"has no {CONFIG_FILE}" if run_dir.is_dir() else "is not a folder"
        raise ConfigError(f"{run_dir} {state}. Give the folder of a run, such as runs/quickstart.")
    return load_config(run_dir / CONFIG_FILE)


def _named_checkpoint(run_dir: Path, name: str) -> Path:
    folder = run_dir / CHECKPOINT_FOLDER
    names = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    if name not in names:
        there = suggestion(name, names) if names else "It has none at all."
        raise ConfigError(f"--checkpoint is {name}, which {folder} does not have. {there}")
    return folder / name
