"""Which image goes where: shares, order and positions of the stream, and the share of the test set.

global batch    |------------- replica 0 ------------|------------- replica 1 ------------|
micro-batches   |     0     |     1     |     2      |     0     |     1     |     2      |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsaux.config import ConfigError
from dsaux.data import ImageDataset, ReplicaStream
from dsaux.data import test_batches as share_of_test_set
from dsaux.data.augment import CropFlip
from dsaux.data.stream import TrainPlan


def numbered_dataset(train: int = 100, test: int = 37, size: int = 8) -> ImageDataset:
    """Image i has the label i, so that a batch tells which images it holds."""
    rng = np.random.default_rng(0)
    return ImageDataset(
        name="numbered",
        train_images=rng.integers(0, 256, (train, size, size, 3), dtype=np.uint8),
        train_labels=np.arange(train),
        test_images=rng.integers(0, 256, (test, size, size, 3), dtype=np.uint8),
        test_labels=np.arange(test),
        num_classes=max(train, test),
        mean=(120.0, 125.0, 130.0),
        std=(60.0, 65.0, 70.0),
    )


def stream_of(dataset: ImageDataset, **changes: Any) -> ReplicaStream:
    settings: dict[str, Any] = {
        "loader": "torch",
        "seed": 3,
        "replica": 0,
        "num_replicas": 1,
        "micro_batch_size": 8,
        "micro_batches_per_step": 1,
        "device": "cpu",
    }
    return ReplicaStream(dataset, **{**settings, **changes})


def take(stream: ReplicaStream, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [next(stream) for _ in range(count)]


def equal(first: list[tuple[torch.Tensor, ...]], second: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(one, other) for a, b in zip(first, second, strict=True) for one, other in zip(a, b, strict=True)
    )


def test_batches_have_the_promised_shapes_and_types():
    inputs, labels = next(stream_of(numbered_dataset()))
    assert inputs.shape == (8, 3, 8, 8)
    assert inputs.dtype == torch.float32
    assert labels.shape == (8,)
    assert labels.dtype == torch.int64
    assert inputs.is_contiguous()


@pytest.mark.parametrize(("replicas", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (2, 4)])
def test_global_batch_is_the_same_however_it_is_split(replicas, micro_batches):
    """The inputs too: an image keeps its crop and flip."""
    dataset, global_batch = numbered_dataset(), 16
    whole = take(stream_of(dataset, micro_batch_size=global_batch), 9)
    parts = [
        stream_of(
            dataset,
            replica=replica,
            num_replicas=replicas,
            micro_batch_size=global_batch // replicas // micro_batches,
            micro_batches_per_step=micro_batches,
        )
        for replica in range(replicas)
    ]
    for inputs, labels in whole:
        pieces = [next(part) for part in parts for _ in range(micro_batches)]
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), inputs)
        assert torch.equal(torch.cat([piece[1] for piece in pieces]), labels)


def test_incomplete_last_batch_is_dropped():
    stream = stream_of(numbered_dataset(100), micro_batch_size=16, micro_batches_per_step=2)
    assert stream.steps_per_epoch == 3
    assert stream.micro_batches_per_epoch == 6
    seen = torch.cat([labels for _, labels in take(stream, 6)])
    assert len(set(seen.tolist())) == 96


def test_an_epoch_holds_each_image_once_over_the_replicas_and_the_next_has_another_order():
    dataset = numbered_dataset(96)
    streams = [
        stream_of(dataset, replica=r, num_replicas=2, micro_batches_per_step=3, micro_batch_size=4) for r in range(2)
    ]
    orders = []
    for _ in range(2):
        labels = [torch.cat([y for _, y in take(s, s.micro_batches_per_epoch)]) for s in streams]
        orders.append(torch.cat(labels).tolist())
        assert sorted(orders[-1]) == list(range(96))
    assert orders[0] != orders[1]


def test_images_of_the_first_epoch_are_cropped_otherwise_in_the_second():
    dataset = numbered_dataset(96)
    stream = stream_of(dataset, micro_batch_size=96)
    (first, first_labels), (second, second_labels) = take(stream, 2)
    same = [torch.equal(first[i], second[second_labels == label][0]) for i, label in enumerate(first_labels)]
    assert sum(same) < 10  # 1 of 162 crops and flips would be equal by chance


def test_another_seed_gives_another_order():
    dataset = numbered_dataset()
    assert not torch.equal(next(stream_of(dataset, seed=0))[1], next(stream_of(dataset, seed=1))[1])


def test_a_seed_above_32_bits_is_fine():
    assert next(stream_of(numbered_dataset(), seed=2**32 + 1_000_002))[0].shape[0] == 8


@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.parametrize("target", [1, 11, 12, 13, 30])
def test_seek_into_another_epoch_and_back_is_exact(loader, target):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    reference = take(stream_of(numbered_dataset(), loader=loader), 34)
    stream = stream_of(numbered_dataset(), loader=loader)
    take(stream, 5)
    stream.seek(target)
    assert stream.position == target
    assert equal(take(stream, 3), reference[target : target + 3])
    stream.seek(2)
    assert equal(take(stream, 2), reference[2:4])
    assert stream.position == 4


def test_seek_to_the_present_position_leaves_the_loader_alone(monkeypatch):
    stream = stream_of(numbered_dataset())
    take(stream, 2)
    monkeypatch.setattr(stream._loader, "seek", lambda position: pytest.fail("the loader was moved"))
    stream.seek(2)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_closed_stream_goes_on_where_it_stood(loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    reference = take(stream_of(numbered_dataset(), loader=loader), 8)
    stream = stream_of(numbered_dataset(), loader=loader)
    take(stream, 5)
    stream.close()
    stream.close()
    assert equal(take(stream, 3), reference[5:8])


def test_any_position_is_addressed_without_the_ones_before():
    arguments: dict[str, Any] = {"seed": 5, "replica": 1, "num_replicas": 2, "augmentation": CropFlip()}
    arguments |= {"micro_batch_size": 8, "micro_batches_per_step": 2}
    replayed = TrainPlan(100, **arguments)
    for position in range(50):
        rows = replayed.rows(position)
    direct = TrainPlan(100, **arguments).rows(49)
    assert np.array_equal(rows.indices, direct.indices)
    for name in ("top", "left", "flip"):
        assert np.array_equal(rows.draws[name], direct.draws[name])


def test_crops_reach_all_of_the_padding_and_half_of_them_are_flipped():
    plan = TrainPlan(
        4000,
        augmentation=CropFlip(),
        seed=0,
        replica=0,
        num_replicas=1,
        micro_batch_size=4000,
        micro_batches_per_step=1,
    )
    draws = plan.rows(0).draws
    assert set(draws["top"]) == set(draws["left"]) == set(range(9))
    assert abs(draws["flip"].mean() - 0.5) < 0.05  # six standard deviations


def test_without_augmentation_the_images_come_as_they_are_but_shuffled():
    dataset = numbered_dataset()
    inputs, labels = next(stream_of(dataset, augment=False))
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (dataset.mean, dataset.std))
    expected = (torch.from_numpy(dataset.train_images[labels.numpy()]).permute(0, 3, 1, 2) - mean) / std
    assert torch.allclose(inputs, expected, atol=1e-6)  # one rounding
    assert labels.tolist() != list(range(8))
    assert torch.equal(labels, next(stream_of(dataset, augment=True))[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch_size": 101}, r"100 samples, fewer than one global batch of 101"),
        (
            {"micro_batches_per_step": 4, "num_replicas": 4},
            r"global batch of 128 .*8 x micro-batches 4 x replicas 4",
        ),
        ({"micro_batch_size": 0}, r"micro_batch_size is 0"),
        ({"replica": 2, "num_replicas": 2}, r"replica is 2 but there are 2; it must be in 0 \.\. 1"),
        ({"loader": "webdataset"}, r'dsaux\.data\.loader is "webdataset".*dali, torch'),
    ],
)
def test_wrong_arguments_are_refused_with_the_numbers(changes, words):
    with pytest.raises(ValueError, match=words):
        stream_of(numbered_dataset(), **changes)


def test_negative_position_is_refused():
    with pytest.raises(ValueError, match="position is -1"):
        stream_of(numbered_dataset()).seek(-1)


@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.parametrize(
    ("test_images", "replicas", "batch_size"),
    [(37, 1, 8), (37, 2, 8), (37, 3, 5), (36, 2, 9), (36, 2, 256), (5, 4, 8), (1, 2, 8), (3, 4, 1)],
)
def test_each_test_image_occurs_once_over_the_replicas(loader, test_images, replicas, batch_size):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    dataset = numbered_dataset(test=test_images)
    found, lengths, shapes = [], set(), set()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (dataset.mean, dataset.std))
    for replica in range(replicas):
        batches = share_of_test_set(
            dataset,
            loader=loader,
            replica=replica,
            num_replicas=replicas,
            batch_size=batch_size,
            device="cpu",
        )
        held = list(batches)
        assert len(held) == len(batches)
        lengths.add(len(held))
        for inputs, labels in held:
            shapes.add(tuple(inputs.shape))
            real = labels[labels >= 0]
            assert torch.equal(labels[labels < 0], torch.full((len(labels) - len(real),), -1))
            images = torch.from_numpy(dataset.test_images[real.numpy()]).permute(0, 3, 1, 2)
            assert torch.allclose(inputs[labels >= 0], (images - mean) / std, atol=1e-5)  # float32 rounding
            found += real.tolist()
    assert sorted(found) == list(range(test_images))
    share = -(-test_images // replicas)
    assert shapes == {(min(batch_size, share), 3, 8, 8)}
    assert lengths == {-(-share // min(batch_size, share))}


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_test_batches_can_be_iterated_twice(loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    batches = share_of_test_set(
        numbered_dataset(), loader=loader, replica=1, num_replicas=2, batch_size=8, device="cpu"
    )
    assert equal(list(batches), list(batches))


def test_unknown_loader_of_test_batches_is_refused():
    with pytest.raises(ConfigError, match=r'dsaux\.data\.loader is "pil"'):
        share_of_test_set(numbered_dataset(), loader="pil", replica=0, num_replicas=1, batch_size=8, device="cpu")


def test_streams_of_one_data_set_share_the_padded_images():
    dataset = numbered_dataset()
    first, second = stream_of(dataset), stream_of(dataset, seed=9)
    assert first._loader._crops._images is second._loader._crops._images  # type: ignore[attr-defined]
