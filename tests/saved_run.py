"""A run folder as a finished run leaves it, with random weights: for tests of what reads run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsaux.checkpoint import CHECKPOINT_FOLDER, publish, write_file
from dsaux.config import Config, config_from_dict
from dsaux.models import build_layers

NUM_CLASSES = 10  # of the data set synthetic

DOCUMENT: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "dsaux": {
        "data": {"name": "synthetic", "loader": "torch", "train_samples": 96, "test_samples": 50, "image_size": 16},
        "pipeline": {"stages": 2, "partition": "uniform"},
        "run": {"bn_batches": 2, "eval_batch_size": 16},
    },
}


def run_config(model: str) -> Config:
    """The run's configuration."""
    document = json.loads(json.dumps(DOCUMENT))
    document["dsaux"]["model"] = {"name": model}
    return config_from_dict(document)


def random_layers(model: str, *, seed: int = 0) -> list[nn.Module]:
    """The layers of a network with random weights and BatchNorm statistics that have seen data."""
    torch.manual_seed(seed)
    layers = [layer.make().eval() for layer in build_layers(model, num_classes=NUM_CLASSES)]
    for module in nn.ModuleList(layers).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.num_batches_tracked.fill_(7)
    return layers


def chain(layers: list[nn.Module], images: Tensor) -> Tensor:
    """The layers one after the other."""
    with torch.no_grad():
        for layer in layers:
            images = layer(images)
    return images


def write_run(run: Path, model: str, *events: dict[str, Any]) -> Path:
    """The folder of a run that has not saved yet; `events` are the lines of metrics.jsonl."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(run_config(model).to_dict()))
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def layout(num_layers: int, *, replicas: int = 1) -> dict[str, Any]:
    """How a network lay on the ranks that saved it."""
    return {
        "schedule": "al",
        "stages": 2,
        "replicas": replicas,
        "micro_batches": 1,
        "bounds": [0, num_layers // 2, num_layers],
    }


def write_checkpoint(run: Path, layers: list[nn.Module], *, step: int, **content: Any) -> Path:
    """Save the layers as the engine does."""
    name = f"step_{step:08d}"
    folder = run / CHECKPOINT_FOLDER
    partial = folder / f".{name}.partial"
    partial.mkdir(parents=True)
    entries = [
        write_file(partial / f"layer_{index:02d}-model_states.pt", layer.state_dict())
        for index, layer in enumerate(layers)
    ]
    about = {
        "step": step,
        "num_layers": len(layers),
        "is_drained": True,
        "is_evaluated": True,
        "layout": layout(len(layers)),
        **content,
    }
    return publish(folder, name, entries=entries, content=about, latest=True)
