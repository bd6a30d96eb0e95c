"""DALI's pipelines on a GPU: the batches of the CPU, the same on every rank, not copied; runs that train on them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsaux.data import batch_digest
from dsaux.data import test_batches as share_of_test_set
from dsaux.data.dali import PREFETCH
from dsaux.data.stream import Batch
from tests.image_files import SIZE, write_tree
from tests.launch.small import write_config
from tests.launch.start import events, start_ranks
from tests.unit.test_files import load, pixels_of
from tests.unit.test_files import stream_of as file_stream_of
from tests.unit.test_stream import equal, numbered_dataset, stream_of, take

pytest.importorskip("nvidia.dali")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICES = ("cpu", "cuda")
STRONG = {"cutout": 4, "rand_augment": 5}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


def on_cpu(batches: list[Batch]) -> list[Batch]:
    return [(inputs.cpu(), labels.cpu()) for inputs, labels in batches]


# Crops and flips are exact and the normalisation is one multiplication and one addition; rand_augment interpolates
# between pixels, which lie up to 255 apart: two roundings of a place differ by 1e-3 of that.
@pytest.mark.parametrize(("changes", "tolerance"), [({}, 1e-5), ({"cutout": 4}, 1e-5), (STRONG, 2e-2)])
def test_images_in_memory_are_those_of_the_cpu(changes: dict[str, int], tolerance: float) -> None:
    dataset = replace(numbered_dataset(), **changes)
    cpu, cuda = (take(stream_of(dataset, loader="dali", device=device), 14) for device in DEVICES)
    for (inputs, labels), (gpu_inputs, gpu_labels) in zip(cpu, cuda, strict=True):
        assert gpu_inputs.device.type == gpu_labels.device.type == "cuda"
        assert (gpu_inputs.dtype, gpu_labels.dtype) == (torch.float32, torch.int64)
        assert torch.equal(gpu_labels.cpu(), labels)
        torch.testing.assert_close(gpu_inputs.cpu(), inputs, rtol=0, atol=tolerance)


# nvJPEG and the CPU's decoder round a pixel differently, and weigh chroma differently where a small window is enlarged.
@pytest.mark.parametrize("color", [0.0, 0.4])
def test_image_files_are_those_of_the_cpu(tree: Path, color: float) -> None:
    dataset = load(tree, color=color)
    cpu, cuda = (take(file_stream_of(dataset, loader="dali", device=device), 6) for device in DEVICES)
    for (inputs, labels), (gpu_inputs, gpu_labels) in zip(cpu, cuda, strict=True):
        assert gpu_inputs.device.type == gpu_labels.device.type == "cuda"
        assert gpu_inputs.shape == (10, 3, SIZE, SIZE)
        assert torch.equal(gpu_labels.cpu(), labels)
        difference = (pixels_of(gpu_inputs.cpu()) - pixels_of(inputs)).abs()
        assert difference.mean() < 2.0
        assert difference.mean(dim=(1, 2, 3)).max() < 6.0
        shifted = (pixels_of(gpu_inputs.cpu())[..., 1:] - pixels_of(inputs)[..., :-1]).abs()
        assert shifted.mean() > 2 * difference.mean(), "a shift by one pixel would show"


def test_test_images_are_those_of_the_cpu(tree: Path) -> None:
    arguments: dict[str, Any] = {"loader": "dali", "replica": 0, "num_replicas": 1, "batch_size": 8}
    cpu, cuda = (list(share_of_test_set(load(tree), device=device, **arguments)) for device in DEVICES)
    for (inputs, labels), (gpu_inputs, gpu_labels) in zip(cpu, cuda, strict=True):
        assert torch.equal(gpu_labels.cpu(), labels)
        real = labels >= 0
        assert (pixels_of(gpu_inputs.cpu()) - pixels_of(inputs)).abs()[real].mean() < 2.0


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_every_rank_makes_the_same_bits_after_a_seek_too(kind: str, tree: Path) -> None:
    def new_stream() -> Any:
        if kind == "files":
            return file_stream_of(load(tree, color=0.4), loader="dali", device="cuda")
        return stream_of(replace(numbered_dataset(), **STRONG), loader="dali", device="cuda")

    one, two = new_stream(), new_stream()
    whole = take(one, 14)
    assert equal(whole, take(two, 14))
    assert len({batch_digest(*batch) for batch in whole}) == 14
    two.seek(9)
    assert equal(whole[9:], take(two, 5))


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_batch_is_handed_over_without_a_copy_and_stays_as_it_is(kind: str, tree: Path) -> None:
    if kind == "files":
        stream = file_stream_of(load(tree), loader="dali", device="cuda")
    else:
        stream = stream_of(numbered_dataset(), loader="dali", device="cuda")
    next(stream)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kept = take(stream, 2 * PREFETCH + 2)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, "PyTorch was asked for memory"
    copies = on_cpu(kept)
    for _ in range(3 * PREFETCH):
        next(stream)
    torch.cuda.synchronize()
    assert equal(on_cpu(kept), copies)


# The GPU's work of the step must have read a batch before DALI writes its memory anew.
def test_a_batch_that_the_gpu_has_still_to_read_is_not_written_over() -> None:
    stream = stream_of(numbered_dataset(), loader="dali", device="cuda")
    expected = on_cpu(take(stream_of(numbered_dataset(), loader="dali", device="cuda"), 10))
    matrix = torch.rand(4096, 4096, device="cuda")
    late = []
    for _ in range(10):
        inputs, labels = next(stream)
        for _ in range(20):  # some milliseconds, in which the host is far ahead
            matrix = (matrix @ matrix).clamp(max=1.0)
        late.append((inputs.clone(), labels.clone()))
        del inputs, labels
    assert equal(on_cpu(late), expected)


@pytest.mark.parametrize(("name", "graphs"), [("photos", True), ("folder", True), ("folder", False)])
def test_two_ranks_train_on_it(name: str, graphs: bool, tree: Path, tmp_path: Path) -> None:
    root = {} if name == "photos" else {"root": str(tree), "train_samples": None, "test_samples": None}
    config = write_config(
        tmp_path / "config.json",
        data={"name": name, "loader": "dali", "image_size": SIZE, "guard_every": 1, **root},
        pipeline={"partition": "parameters"},
        run={"epochs": 12 if name == "photos" else 20, "eval_every": 20, "cuda_graphs": graphs},
    )
    run_dir = tmp_path / "run"
    batch = ["--set", "train_batch_size=20"] if name == "folder" else []
    arguments = ["--ds_config", str(config), "--run_dir", str(run_dir), *batch]
    ranks = start_ranks(arguments, world_size=2, folder=tmp_path / "logs", device="cuda")
    assert ranks.wait() == [0, 0], ranks.text()
    losses = [event["loss"] for event in events(run_dir, "step")]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert "cuda_graphs is true, but" not in ranks.text()
