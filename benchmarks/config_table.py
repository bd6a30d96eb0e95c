"""The table of ds_configs/README.md: what each configuration is for, how it is started, and what it reached.

`report.py` writes it. A result is the mean over the runs of `benchmarks/results/seeds.jsonl` with this configuration,
its method, and nothing but the seed changed; a configuration without one is not measured yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seeds import Row

from dsaux.config import load_config

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
CPU, GPUS, MANY_GPUS = "CPU cores or any GPUs", "GPUs", "4 GPUs, or 8 for two replicas"


@dataclass(frozen=True)
class Purpose:
    """What some configurations are for.

    Attributes:
        start: beginning of their names.
        text: in words.
        hardware: what they are made for.
    """

    start: str
    text: str
    hardware: str


PURPOSES = (
    Purpose("quickstart", "the README's first run", CPU),
    Purpose("resnet20_k3", "accuracy with three stages, small enough for many seeds", CPU),
    Purpose("resnet32_k5", "accuracy with five stages, small enough for many seeds", CPU),
    Purpose("resnet110_k3", "accuracy of a deep network", CPU),
    Purpose("choices", "the curves of docs/choosing.md", CPU),
    Purpose("vit_photos", "a vision transformer, examples/vit.py", CPU),
    Purpose("gpt_text", "a small language model on characters, examples/gpt.py", CPU),
    Purpose("cifar10_", "CIFAR-10", GPUS),
    Purpose("cifar100_", "CIFAR-100", GPUS),
    Purpose("imagenet_", "ImageNet", MANY_GPUS),
)


def config_table(rows: Sequence[Row]) -> str:
    """One line for each configuration.

    Args:
        rows: lines of seeds.jsonl.

    Raises:
        ValueError: if a configuration has no purpose, or a purpose no configuration.
    """
    lines = [
        "| configuration | what for | network | schedule | stages | hardware | command | test accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    paths = {purpose: sorted(FOLDER.glob(f"{purpose.start}*.json")) for purpose in PURPOSES}
    missing = set(FOLDER.glob("*.json")) - {path for found in paths.values() for path in found}
    if missing:
        raise ValueError(f"{min(missing).name} has no purpose in benchmarks/config_table.py; add one.")
    for purpose, found in paths.items():
        if not found:
            raise ValueError(f"no configuration is named {purpose.start}*; remove its purpose.")
        lines += [_line(path, purpose, rows) for path in found]
    return "\n".join(lines)


def _line(path: Path, purpose: Purpose, rows: Sequence[Row]) -> str:
    dsaux = load_config(path).dsaux
    stages, schedule = dsaux.pipeline.stages, dsaux.pipeline.schedule
    method = f"{schedule}+1f1b" if dsaux.run.exact_epochs else schedule
    command = f"deepspeed --num_gpus {stages} train.py --ds_config ds_configs/{path.name}"
    cells = [
        f"`{path.stem}`",
        purpose.text,
        f"`{dsaux.model.name}`",
        f"`{schedule}`",
        str(stages),
        purpose.hardware,
        f"`{command}`",
        result_of(path.stem, rows, method=method),
    ]
    return "| " + " | ".join(cells) + " |"


def result_of(case: str, rows: Sequence[Row], *, method: str) -> str:
    """Mean and range of the test accuracy, with the number of runs; "not measured yet" without any.

    Runs by another method are of an older file of the same name.
    """
    own = [
        row["final"]["test_accuracy"]
        for row in rows
        if row["case"] == case
        and row["final"]["method"] == method
        and all(change.startswith("dsaux.run.seed=") for change in row["overrides"])
    ]
    if not own:
        return "not measured yet"
    spread = f" ({min(own):.3f} to {max(own):.3f})" if len(own) > 1 else ""
    return f"{statistics.mean(own):.3f}{spread}, n = {len(own)}"
