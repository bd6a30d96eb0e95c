"""Image files: listed and seen as by torchvision, and the same in trees, shards and processes."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets, transforms

from dsaux.assemble import evaluation_batches
from dsaux.config import Launch, check_launch, config_from_dict
from dsaux.data import ReplicaStream, batch_digest, image_size, load_dataset, sample_counts
from dsaux.data import test_batches as share_of_test_set
from dsaux.data.files import MEAN, STD, FileDataset
from dsaux.data.index import write_index
from dsaux.data.layout import spread
from dsaux.data.pictures import DamagedImageError
from dsaux.data.shards import find_shards, index_path
from dsaux.data.stream import TestBatches
from dsaux.data.views import shorter_side
from tests.bad_input import good_config
from tests.image_files import NUM_CLASSES, SIZE, TEST, TRAIN, folder_data, write_shards, write_tree
from tests.unit.test_stream import equal, take

ROOT = Path(__file__).parents[2]
LOADERS = ["torch", "dali"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_shards(tmp_path_factory.mktemp("shards"), tree=tree)
    for split in ("train", "val"):
        for shard in find_shards(root / split):
            write_index(shard)
    return root


def load(root: Path, **changes: Any) -> FileDataset:
    dataset = load_dataset(folder_data(root, **changes))
    assert isinstance(dataset, FileDataset)
    return dataset


def stream_of(dataset: FileDataset, *, loader: str, **changes: Any) -> ReplicaStream:
    arguments: dict[str, Any] = {
        "seed": 5,
        "replica": 0,
        "num_replicas": 1,
        "micro_batch_size": 10,
        "micro_batches_per_step": 1,
        "device": "cpu",
    }
    return ReplicaStream(dataset, loader=loader, **{**arguments, **changes})


def pixels_of(inputs: torch.Tensor) -> torch.Tensor:
    """The pixels that were normalised, 0 .. 255."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return inputs * std + mean


def needs(loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")


@pytest.mark.parametrize(("split", "folder"), [("train", "train"), ("test", "val")])
def test_labels_and_order_are_those_of_torchvision(tree: Path, split: str, folder: str) -> None:
    dataset, reference = load(tree), datasets.ImageFolder(str(tree / folder))
    images = getattr(dataset, split)
    assert [(images.where(i), int(images.labels[i])) for i in range(len(images))] == reference.samples
    assert dataset.classes == tuple(reference.classes)
    assert (dataset.num_classes, dataset.num_train, dataset.num_test) == (
        NUM_CLASSES,
        NUM_CLASSES * TRAIN,
        NUM_CLASSES * TEST,
    )


@pytest.mark.parametrize("kind", ["tree", "shards"])
def test_files_and_labels_are_those_of_dalis_own_readers(kind: str, tree: Path, shards: Path) -> None:
    """To the byte: the loader hands files to DALI itself (docs/design.md) and reads what `readers.file` would."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import Pipeline

    images = load(tree if kind == "tree" else shards, name="imagenet").train
    pipeline = Pipeline(batch_size=len(images), num_threads=1, device_id=None)
    with pipeline:
        if kind == "tree":
            outputs = fn.readers.file(file_root=str(tree / "train"))
        else:
            paths = [str(path) for path in find_shards(shards / "train")]
            outputs = fn.readers.webdataset(
                paths=paths, index_paths=[str(index_path(Path(path))) for path in paths], ext=["jpg;jpeg;png", "cls"]
            )
        pipeline.set_outputs(*outputs)
    pipeline.build()
    files, labels = pipeline.run()
    for number in range(len(images)):
        assert images.read(number) == np.array(files[number]).tobytes(), images.where(number)
        label = np.array(labels[number])
        assert images.labels[number] == (int(label[0]) if kind == "tree" else int(label.tobytes()))


# The torch loader resizes with PIL, as torchvision does here. DALI rounds differently, by less than
# 1 on average; a picture shifted by one pixel differs by more than 4.
@pytest.mark.parametrize(("loader", "tolerance"), [("torch", 1e-3), ("dali", 1.0)])
def test_test_pixels_are_those_of_torchvision(tree: Path, loader: str, tolerance: float) -> None:
    needs(loader)
    dataset = load(tree)
    reference = datasets.ImageFolder(
        str(tree / "val"),
        transforms.Compose(
            [transforms.Resize(shorter_side(SIZE)), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
        ),
    )
    batches = share_of_test_set(dataset, loader=loader, replica=0, num_replicas=1, batch_size=8, device="cpu")
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    number = len(reference)
    assert labels[:number].tolist() == reference.targets
    assert (labels[number:] == -1).all()
    expected = torch.stack([reference[i][0] for i in range(number)]).float()
    differences = (pixels_of(inputs[:number]) - expected).abs().mean(dim=(1, 2, 3))
    assert differences.max() < tolerance
    shifted = (pixels_of(inputs[:number])[..., 1:] - expected[..., :-1]).abs().mean()
    assert shifted > 4


@pytest.mark.parametrize("color", [0.0, 0.4])
def test_dali_and_torch_see_the_same_windows_flips_and_colours(tree: Path, color: float) -> None:
    needs("dali")
    dataset = load(tree, color=color)
    ours, dali = (take(stream_of(dataset, loader=loader), 6) for loader in LOADERS)
    for (inputs, labels), (dali_inputs, dali_labels) in zip(ours, dali, strict=True):
        assert torch.equal(labels, dali_labels)
        assert inputs.dtype == dali_inputs.dtype == torch.float32
        assert inputs.shape == dali_inputs.shape == (10, 3, SIZE, SIZE)
        difference = (pixels_of(inputs) - pixels_of(dali_inputs)).abs()
        # Windows of these small images are enlarged up to threefold, where chroma decoding shows most.
        assert difference.mean() < 1.0
        assert difference.mean(dim=(1, 2, 3)).max() < 4.0


@pytest.mark.parametrize("loader", LOADERS)
def test_a_tree_and_shards_of_the_same_images_give_the_same_batches(tree: Path, shards: Path, loader: str) -> None:
    needs(loader)
    batches = [take(stream_of(load(root, name="imagenet"), loader=loader), 8) for root in (tree, shards)]
    assert equal(*batches)
    shares = [
        list(
            share_of_test_set(
                load(root, name="imagenet"), loader=loader, replica=1, num_replicas=2, batch_size=4, device="cpu"
            )
        )
        for root in (tree, shards)
    ]
    assert equal(*shares)


def test_another_process_makes_the_same_batches_for_two_epochs_and_after_a_seek(tree: Path) -> None:
    needs("dali")
    code = (
        "from pathlib import Path\n"
        "from tests.unit.test_files import digests\n"
        f"print([digests(Path({str(tree)!r}), loader) for loader in {LOADERS!r}])\n"
    )
    other = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, cwd=ROOT)
    assert other.stdout.strip().splitlines()[-1:] == [str([digests(tree, loader) for loader in LOADERS])], other.stderr


def digests(root: Path, loader: str) -> list[int]:
    """Of two epochs of the stream and, after a seek into the second, of its end again."""
    stream = stream_of(load(root, color=0.4), loader=loader)
    whole = take(stream, 12)
    stream.seek(9)
    again = take(stream, 3)
    stream.close()
    assert equal(again, whole[9:])
    return [batch_digest(*batch) for batch in whole]


def test_dali_gives_bit_identical_batches_with_any_number_of_threads(tree: Path) -> None:
    needs("dali")
    from dsaux.data.dali_files import DaliFileLoader

    batches = []
    for num_threads in (1, 3):
        stream = stream_of(load(tree, color=0.4), loader="dali")
        loader = DaliFileLoader(stream._loader._job, num_threads=num_threads)
        batches.append([loader.load() for _ in range(7)])
        loader.close()
    assert equal(*batches)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_worker_processes_give_the_same_batches_and_name_a_file_that_is_gone(tree: Path, tmp_path: Path) -> None:
    dataset = load(Path(shutil.copytree(tree, tmp_path / "copy")))
    stream = stream_of(dataset, loader="torch", workers=1)
    reference = take(stream_of(dataset, loader="torch"), 2)
    (tmp_path / "copy/train/n05/2.JPEG").unlink()
    number = 5 * 6 + 2
    order = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(0,))).permutation(60)
    whole = int(np.flatnonzero(order == number)[0]) // 10  # batches before the one with this image
    assert equal(take(stream, min(whole, 2)), reference[:whole])
    with pytest.raises(DamagedImageError, match=r"n05/2.JPEG cannot be used: No such file"):
        take(stream, 6)
    stream.close()


def test_an_evaluation_has_the_configured_worker_processes_and_gives_the_same_batches(tree: Path) -> None:
    alone, shared = (evaluation(tree, workers=workers, batch_size=7) for workers in (0, 2))
    before = set(multiprocessing.active_children())
    found = iter(shared)
    first = next(found)
    assert len(set(multiprocessing.active_children()) - before) == 2
    assert equal([first, *found], list(alone))
    assert set(multiprocessing.active_children()) <= before  # they last as long as the evaluation


def test_an_evaluation_of_few_batches_has_no_idle_worker_processes(tree: Path) -> None:
    batches = evaluation(tree, workers=2, batch_size=30)
    before = set(multiprocessing.active_children())
    assert [len(set(multiprocessing.active_children()) - before) for _ in batches] == [1]


def evaluation(tree: Path, *, workers: int, batch_size: int) -> TestBatches:
    """The test batches of a run on this tree."""
    sets: dict[str, Any] = {"dsaux.data.name": "folder", "dsaux.data.root": str(tree), "dsaux.data.image_size": SIZE}
    sets |= {"dsaux.data.train_samples": None, "dsaux.data.test_samples": None}
    sets |= {"dsaux.data.workers": workers, "dsaux.run.eval_batch_size": batch_size}
    config, launch = config_from_dict(good_config(sets)), Launch(1, 1, 1, 32, 32, 1)
    return evaluation_batches(config, launch, dataset=load(tree), replica=0, device=torch.device("cpu"))


@pytest.mark.parametrize("loader", LOADERS)
def test_replicas_see_disjoint_shares_and_the_same_images_in_the_same_way(tree: Path, loader: str) -> None:
    needs(loader)
    dataset = load(tree)
    alone = take(stream_of(dataset, loader=loader, micro_batch_size=20), 3)
    shares = [take(stream_of(dataset, loader=loader, replica=replica, num_replicas=2), 3) for replica in (0, 1)]
    for (inputs, labels), first, second in zip(alone, *shares, strict=True):
        assert torch.equal(inputs, torch.cat([first[0], second[0]]))
        assert torch.equal(labels, torch.cat([first[1], second[1]]))
    assert len({batch_digest(image, torch.zeros(1)) for inputs, _ in alone for image in inputs}) == 60


@pytest.mark.parametrize("loader", LOADERS)
def test_without_augmentation_training_images_are_seen_as_test_images(tree: Path, loader: str) -> None:
    needs(loader)
    dataset = load(tree)
    swapped = replace(dataset, test=dataset.train, test_subset=dataset.train_subset)
    expected, _ = next(
        iter(share_of_test_set(swapped, loader=loader, replica=0, num_replicas=1, batch_size=60, device="cpu"))
    )
    stream = stream_of(dataset, loader=loader, augment=False, micro_batch_size=60)
    inputs, _ = next(stream)
    order = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(0,))).permutation(60)
    assert torch.equal(inputs, expected[order])


def test_fewer_samples_are_spread_over_the_classes(tree: Path) -> None:
    dataset = load_dataset(replace(folder_data(tree), train_samples=25, test_samples=10))
    assert (dataset.num_train, dataset.num_test) == (25, 10)
    labels = dataset.train.labels[dataset.train_subset]
    assert set(np.bincount(labels, minlength=NUM_CLASSES)) == {2, 3}
    assert (dataset.test.labels[dataset.test_subset] == np.arange(10)).all()


@pytest.mark.parametrize("count", [1, 7, 49, 50])
def test_a_subset_has_distinct_images_and_every_class_its_share(count: int) -> None:
    labels = np.random.default_rng(0).integers(0, 4, size=50)
    chosen = spread(labels, count)
    assert len(set(chosen.tolist())) == count
    assert (np.diff(chosen) > 0).all()
    shares = np.bincount(labels, minlength=4) * count / 50
    assert (abs(np.bincount(labels[chosen], minlength=4) - shares) <= 1).all()


def test_the_image_size_is_the_data_sets_own_where_none_is_given(tree: Path) -> None:
    data = replace(folder_data(tree), image_size=None)
    assert image_size(data) == 224
    assert load_dataset(data).input_spec.shape == (3, 224, 224)
    assert sample_counts(data) == (NUM_CLASSES * TRAIN, NUM_CLASSES * TEST)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_configuration_with_image_files_passes_the_checks(tree: Path, name: str) -> None:
    sets: dict[str, Any] = {"dsaux.data.name": name, "dsaux.data.root": str(tree), "dsaux.data.loader": "torch"}
    sets |= {"train_batch_size": 20, "dsaux.data.train_samples": None, "dsaux.data.test_samples": None}
    config = config_from_dict(good_config(sets))
    assert check_launch(config, world_size=2).train_batch_size == 20
