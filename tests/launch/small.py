"""A small run for the launch tests: resnet8 on 512 photos of 16 pixels, 8 steps an epoch, a few milliseconds each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS_PER_EPOCH = 8
DOCUMENT: dict[str, Any] = {
    "train_batch_size": 64,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 4, "warmup_min_ratio": 0.01},
    },
    "gradient_clipping": 5.0,
    "dsaux": {
        "model": {"name": "resnet8"},
        "data": {"loader": "torch", "train_samples": 512, "test_samples": 180, "image_size": 16},
        "pipeline": {"stages": 2, "partition": "time", "schedule": "al"},
        "run": {"name": "small", "epochs": 3, "log_every": 1, "bn_batches": 2, "eval_batch_size": 64},
    },
}


def write_config(path: Path, **blocks: dict[str, Any]) -> Path:
    """Write the small configuration; `blocks` change keys of the dsaux block, block by block."""
    document = json.loads(json.dumps(DOCUMENT))
    for block, values in blocks.items():
        document["dsaux"].setdefault(block, {}).update(values)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
