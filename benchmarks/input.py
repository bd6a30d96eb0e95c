"""How fast does a rank get its images? Samples per second of each loader, all of them in turns in one process.

    python benchmarks/input.py --datasets photos --pipelines dali torch torch-2 torchvision torchvision-2

A contestant is a pipeline on a data set. `dali` and `torch` are dsaux's loaders with crops and flips, `-strong` with
Cutout and operations as in RandAugment as well; `torchvision` is PyTorch's DataLoader with the usual transforms
(RandomCrop, RandomHorizontalFlip, ToTensor, Normalize) on the same images in memory. `-2` has two worker processes.
All contestants are open at once and take turns in blocks, so that a slow minute of the machine meets all of them; those
that wait have filled their queues and rest. A block discards as many batches as any queue holds, then times the rest.

`pictures` are JPEGs made here, cropped to 224 x 224 pixels; Cutout and the like are for images in memory alone. With
`--device cuda` batches end on the GPU, and DALI works there: it decodes JPEGs on it ("mixed"), crops and normalises.
Lines go to benchmarks/results/input.jsonl.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pictures import make_pictures
from rich.console import Console
from rich.table import Table
from seeds import append_line

from dsaux.config import ConfigError, DataConfig
from dsaux.data import ImageDataset, ReplicaStream, check_dataset, load_dataset
from dsaux.environment import describe_environment

ROOT = Path(__file__).resolve().parent.parent
STRONG = {"cutout": 8, "rand_augment": 5}
"""Keys of dsaux.data of the pipelines with more than crops and flips."""

Row = dict[str, Any]
Batches = Iterator[Any]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        datasets: names in DATASETS.
        pipelines: names in PIPELINES.
        samples: training images.
        root: folder of a data set of files; None for its default.
        batch_size: images in a batch.
        batches: measured batches in a block.
        blocks: measured blocks of each contestant.
        warmup: batches discarded at the start of a block; no less than a loader holds ready.
        threads: of PyTorch and DALI.
        device: where the batches are put, "cpu" or "cuda".
    """

    datasets: tuple[str, ...]
    pipelines: tuple[str, ...]
    samples: int = 6000
    root: str | None = None
    batch_size: int = 128
    batches: int = 60
    blocks: int = 7
    warmup: int = 8
    threads: int = 1
    device: str = "cpu"


def main() -> int:
    """Measure, print, append the lines; 2 for a data set that is not there."""
    plan, out = parse_arguments()
    try:
        for name in plan.datasets:  # before any is measured
            if name in FILES:
                check_dataset(DataConfig(name=name, root=plan.root, loader="torch"))
        measure_all(plan, out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure_all(plan: Plan, out: Path) -> None:
    """Measure one data set after the other.

    Raises:
        ConfigError: if one cannot be had.
    """
    torch.set_num_threads(plan.threads)
    environment = describe_environment(world_size=1)
    for name in plan.datasets:
        dataset = DATASETS[name](plan)
        pipelines = tuple(
            pipeline for pipeline in plan.pipelines if isinstance(dataset, ImageDataset) or "strong" not in pipeline
        )
        speeds = measure(replace(plan, pipelines=pipelines), dataset)
        rows = [
            summary(plan, dataset=name, pipeline=pipeline, speeds=speeds[pipeline], environment=environment)
            for pipeline in pipelines
        ]
        for row in rows:
            append_line(out, row)
        Console(width=None if sys.stdout.isatty() else 150).print(rich_table(rows))


def parse_arguments() -> tuple[Plan, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=["photos"], help="data sets (photos)")
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES), help="contestants (all)")
    parser.add_argument("--samples", type=int, default=Plan.samples, help="training images (6000)")
    parser.add_argument("--root", default=Plan.root, help="folder of a data set of files (dsaux.data.root)")
    parser.add_argument("--batch_size", type=int, default=Plan.batch_size, help="images in a batch (128)")
    parser.add_argument("--batches", type=int, default=Plan.batches, help="measured batches in a block (60)")
    parser.add_argument("--blocks", type=int, default=Plan.blocks, help="measured blocks of each contestant (7)")
    parser.add_argument("--warmup", type=int, default=Plan.warmup, help="batches discarded in each block (8)")
    parser.add_argument("--threads", type=int, default=Plan.threads, help="threads of PyTorch and DALI (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Plan.device, help="where batches are put (cpu)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/input.jsonl", help="file to append to")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    plan = Plan(**{key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()})
    for name, least in (("batch_size", 1), ("batches", 1), ("blocks", 1), ("warmup", 0), ("threads", 1)):
        if getattr(plan, name) < least:
            parser.error(f"--{name} is {getattr(plan, name)}; it must be {least} or more.")
    if plan.samples < plan.batch_size:
        parser.error(f"--samples is {plan.samples}, less than a batch of {plan.batch_size}. Take more.")
    if plan.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no GPU here. Take cpu.")
    return plan, out


# ---- the contestants ------------------------------------------------------------------------------------------------


def _in_memory(name: str) -> Callable[[Plan], ImageDataset]:
    return lambda plan: load_dataset(DataConfig(name=name, root=plan.root, train_samples=plan.samples))


def _pictures(plan: Plan) -> Any:
    folder = make_pictures(Path(tempfile.mkdtemp(prefix="dsaux-pictures-")))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return load_dataset(DataConfig(name="folder", root=str(folder)))


def _files(name: str) -> Callable[[Plan], Any]:
    return lambda plan: load_dataset(DataConfig(name=name, root=plan.root))


FILES = ("imagenet", "folder")
DATASETS: dict[str, Callable[[Plan], Any]] = {
    **{name: _in_memory(name) for name in ("photos", "cifar10", "cifar100")},
    "pictures": _pictures,
    **{name: _files(name) for name in FILES},
}
"""How each data set is made; photos are as large as CIFAR's images and pictures as ImageNet's, and need no files."""


@contextlib.contextmanager
def _ours(dataset: Any, plan: Plan, *, loader: str, workers: int = 0, is_strong: bool = False) -> Iterator[Batches]:
    stream = ReplicaStream(
        replace(dataset, **STRONG) if is_strong else dataset,
        loader=loader,
        seed=0,
        replica=0,
        num_replicas=1,
        micro_batch_size=plan.batch_size,
        micro_batches_per_step=1,
        device=plan.device,
        workers=workers,
    )
    try:
        yield iter(stream)
    finally:
        stream.close()


class PicturesInMemory(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images in memory with torchvision's transforms.

    Args:
        images: uint8 (N, H, W, C).
        labels: (N,).
        transform: takes a picture of PIL.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], transform: Callable[..., Any]) -> None:
        self._images, self._labels, self._transform = images, labels, transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._images[index])), int(self._labels[index])


def _reference(dataset: Any) -> Any:
    """torchvision's data set with the usual transforms, on the same images."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    _, height, _ = dataset.input_spec.shape
    is_in_memory = isinstance(dataset, ImageDataset)
    crop = transforms.RandomCrop(height, padding=4) if is_in_memory else transforms.RandomResizedCrop(height)
    transform = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([part / 255 for part in dataset.mean], [part / 255 for part in dataset.std]),
        ]
    )
    if is_in_memory:
        return PicturesInMemory(dataset.train_images, dataset.train_labels, transform)
    return ImageFolder(Path(dataset.train.where(0)).parent.parent, transform)


@contextlib.contextmanager
def _torchvision(dataset: Any, plan: Plan, *, workers: int = 0) -> Iterator[Batches]:
    loader = torch.utils.data.DataLoader(
        _reference(dataset),
        batch_size=plan.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,
    )

    def endless() -> Batches:
        while True:
            for images, labels in loader:
                yield images.to(plan.device), labels.to(plan.device)

    yield endless()


PIPELINES: dict[str, Callable[[Any, Plan], contextlib.AbstractContextManager[Batches]]] = {
    "dali": lambda dataset, plan: _ours(dataset, plan, loader="dali"),
    "torch": lambda dataset, plan: _ours(dataset, plan, loader="torch"),
    "torch-2": lambda dataset, plan: _ours(dataset, plan, loader="torch", workers=2),
    "dali-strong": lambda dataset, plan: _ours(dataset, plan, loader="dali", is_strong=True),
    "torch-strong": lambda dataset, plan: _ours(dataset, plan, loader="torch", is_strong=True),
    "torch-strong-2": lambda dataset, plan: _ours(dataset, plan, loader="torch", workers=2, is_strong=True),
    "torchvision": lambda dataset, plan: _torchvision(dataset, plan),
    "torchvision-2": lambda dataset, plan: _torchvision(dataset, plan, workers=2),
}
"""Opens a contestant on a data set: batches without end."""


# ---- the figures ----------------------------------------------------------------------------------------------------


def measure(plan: Plan, dataset: Any) -> dict[str, list[float]]:
    """Samples per second of each pipeline, block by block."""
    speeds: dict[str, list[float]] = {name: [] for name in plan.pipelines}
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(PIPELINES[name](dataset, plan)) for name in plan.pipelines}
        for block in range(-1, plan.blocks):  # block -1 starts processes and builds pipelines
            turn = max(block, 0) % len(plan.pipelines)
            for name in plan.pipelines[turn:] + plan.pipelines[:turn]:
                speed = time_block(opened[name], plan)
                if block >= 0:
                    speeds[name].append(speed)
    return speeds


def time_block(batches: Batches, plan: Plan) -> float:
    """Samples per second over one block, the warm-up left out."""
    for _ in range(plan.warmup):
        next(batches)
    started, samples = time.perf_counter(), 0
    for _ in range(plan.batches):
        samples += len(next(batches)[1])
    if plan.device == "cuda":
        torch.cuda.synchronize()
    return samples / (time.perf_counter() - started)


def summary(plan: Plan, *, dataset: str, pipeline: str, speeds: Sequence[float], environment: Row) -> Row:
    """One line of results.

    Args:
        plan: what was measured.
        dataset: a name in DATASETS.
        pipeline: a name in PIPELINES.
        speeds: samples per second, one for each block.
        environment: of this run.
    """
    settings = {key: value for key, value in asdict(plan).items() if key not in ("datasets", "pipelines", "root")}
    return {
        **settings,
        "dataset": dataset,
        "pipeline": pipeline,
        "keys": STRONG if "strong" in pipeline else {},
        "n": len(speeds),
        "samples_per_s": [round(value, 1) for value in (statistics.median(speeds), min(speeds), max(speeds))],
        "environment": {key: value for key, value in environment.items() if key not in ("command", "host")},
    }


def rich_table(rows: Sequence[Row]) -> Table:
    """The lines of one data set for a terminal."""
    first = rows[0]
    table = Table(
        title=f"{first['dataset']}, batches of {first['batch_size']} on {first['device']}, {first['threads']} threads; "
        f"{first['n']} blocks of {first['batches']} batches"
    )
    table.add_column("pipeline")
    for head in ("samples/s, median", "lowest to highest"):
        table.add_column(head, justify="right")
    for row in rows:
        median, low, high = row["samples_per_s"]
        table.add_row(row["pipeline"], f"{median:,.0f}", f"{low:,.0f} to {high:,.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
