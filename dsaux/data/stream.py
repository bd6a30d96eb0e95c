"""Which image goes where: the endless stream of a replica's micro-batches, and the batches of an evaluation.

The trainer reads both. All ranks of a replica make the same stream on their own: order, crops and flips of an
epoch are drawn from (seed, epoch) alone, so nothing has to be sent, and any position can be reached without
replaying the ones before. Step t of an epoch takes the t-th global batch of the epoch's permutation, here
with 2 replicas x 3 micro-batches:

    global batch    |------------- replica 0 ------------|------------- replica 1 ------------|
    micro-batches   |     0     |     1     |     2      |     0     |     1     |     2      |

The same image is thus augmented in the same way whatever the number of replicas and micro-batches. A loader
(dali.py, torch_loader.py) is given a `LoaderJob`: images, and a plan that says for any position which rows,
crops and flips make up its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsaux.config_rules import ConfigError, show
from dsaux.data import PADDING, ImageDataset, refuse_dali_workers, require_dali

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs, float32 (B, C, H, W), normalised, and labels, int64 (B,)."""


@dataclass(frozen=True)
class Rows:
    """What one batch is made of; all arrays have shape (B,).

    Attributes:
        indices: images, by index.
        top: first row of the crop.
        left: first column of the crop.
        flip: whether the crop is mirrored from left to right.
        labels: labels, below 0 for padding.
    """

    indices: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip: NDArray[np.bool_]
    labels: NDArray[np.int64]


class Plan(Protocol):
    """Says what the batch at any position >= 0 is made of."""

    def rows(self, position: int) -> Rows:
        """Returns the rows of one batch, the same ones whenever it is asked."""
        ...


@dataclass(frozen=True, eq=False)
class LoaderJob:
    """All that a loader needs to know.

    Attributes:
        images: uint8, shape (N, H + margin, W + margin, C).
        plan: what each batch is made of.
        batch_size: images in each batch.
        margin: rows and columns by which the images are larger than the crops.
        mean: per channel, in units of 0 .. 255.
        std: per channel, in units of 0 .. 255.
        device: where the batches are put.
    """

    images: NDArray[np.uint8]
    plan: Plan
    batch_size: int
    margin: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of a crop."""
        return self.images.shape[1] - self.margin, self.images.shape[2] - self.margin


class Loader(Protocol):
    """Makes the batches of a job, one after the other."""

    def seek(self, position: int) -> None:
        """Go on at this position; batches that were made ahead are dropped."""
        ...

    def load(self) -> Batch:
        """Returns the next batch; it belongs to the caller."""
        ...

    def close(self) -> None:
        """End threads and processes."""
        ...


class ReplicaStream:
    """Endless micro-batches of one replica; the same on all its ranks.

    The incomplete last batch of an epoch is dropped. The loader starts with the first micro-batch.

    Args:
        dataset: the images.
        loader: "dali" or "torch".
        seed: order and augmentation are drawn from this and the epoch.
        replica: which replica, 0 .. num_replicas - 1.
        num_replicas: replicas that share the data.
        micro_batch_size: images in a micro-batch.
        micro_batches_per_step: micro-batches of this replica in a step.
        device: where the batches are put.
        workers: worker processes of the torch loader; 0 loads in this process.
        augment: random crops and flips; without, the images come as they are, but in random order still.

    Attributes:
        steps_per_epoch: whole global batches in the training set.
        micro_batches_per_epoch: micro-batches of this replica in an epoch.

    Raises:
        ValueError: if a size is not positive, the replica does not exist, or an epoch has no step.
        ConfigError: if the loader is unknown or not installed.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        loader: str,
        seed: int,
        replica: int,
        num_replicas: int,
        micro_batch_size: int,
        micro_batches_per_step: int,
        device: torch.device | str,
        workers: int = 0,
        augment: bool = True,
    ) -> None:
        _check_share(replica, num_replicas=num_replicas)
        plan = TrainPlan(
            dataset.train_labels,
            seed=seed,
            replica=replica,
            num_replicas=num_replicas,
            micro_batch_size=micro_batch_size,
            micro_batches_per_step=micro_batches_per_step,
            augment=augment,
        )
        self.steps_per_epoch = plan.steps_per_epoch
        self.micro_batches_per_epoch = plan.micro_batches_per_epoch
        job = LoaderJob(
            images=dataset.padded_train_images if augment else dataset.train_images,
            plan=plan,
            batch_size=micro_batch_size,
            margin=2 * PADDING if augment else 0,
            mean=dataset.mean,
            std=dataset.std,
            device=torch.device(device),
        )
        self._loader = make_loader(loader, job, workers=workers)
        self._position = 0

    @property
    def position(self) -> int:
        """Micro-batches since the start of the run; the number of the next one."""
        return self._position

    def seek(self, position: int) -> None:
        """Go on at micro-batch `position` of the run; free of cost where the stream stands there already.

        Raises:
            ValueError: if the position is negative.
        """
        if position < 0:
            raise ValueError(f"position is {position}; a stream starts at 0. Give a number >= 0.")
        if position != self._position:
            self._loader.seek(position)
            self._position = position

    def close(self) -> None:
        """End the loader's threads and processes; reading on starts them again."""
        self._loader.close()
        self._loader.seek(self._position)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._loader.load()
        self._position += 1
        return batch


class TestBatches:
    """One replica's share of the test set; see `test_batches`."""

    __test__ = False  # not a test of pytest's

    def __init__(self, job: LoaderJob, *, loader: str, num_batches: int) -> None:
        self._job, self._loader, self._num_batches = job, loader, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        loader = make_loader(self._loader, self._job, workers=0)
        try:
            for _ in range(self._num_batches):
                yield loader.load()
        finally:
            loader.close()


def test_batches(
    dataset: ImageDataset,
    *,
    loader: str,
    replica: int,
    num_replicas: int,
    batch_size: int,
    device: torch.device | str,
) -> TestBatches:
    """One replica's share of the test set in batches of one shape; every replica has as many.

    Over all replicas each test image occurs once with its label; rows that fill up a batch have the label -1.

    Args:
        dataset: the images.
        loader: "dali" or "torch".
        replica: which replica, 0 .. num_replicas - 1.
        num_replicas: replicas that share the test set.
        batch_size: images in a batch; lowered to the share where that is smaller.
        device: where the batches are put.

    Returns:
        An object with a length, which can be iterated any number of times.

    Raises:
        ValueError: if the batch size is not positive, the replica does not exist, or the test set is empty.
        ConfigError: if the loader is unknown or not installed.
    """
    _check_share(replica, num_replicas=num_replicas)
    if batch_size < 1 or not len(dataset.test_labels):
        raise ValueError(
            f"batch_size is {batch_size} and the test set has {len(dataset.test_labels)} images; both must "
            "be at least 1."
        )
    share = -(-len(dataset.test_labels) // num_replicas)
    plan = TestPlan(dataset.test_labels, start=replica * share, share=share, batch_size=min(batch_size, share))
    job = LoaderJob(
        images=dataset.test_images,
        plan=plan,
        batch_size=plan.batch_size,
        margin=0,
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device(device),
    )
    return TestBatches(job, loader=_known(loader), num_batches=plan.num_batches)


test_batches.__test__ = False  # type: ignore[attr-defined]  # not a test of pytest's


class TrainPlan:
    """Order, crops and flips of the training images; arguments as for `ReplicaStream`."""

    def __init__(
        self,
        labels: NDArray[np.int64],
        *,
        seed: int,
        replica: int,
        num_replicas: int,
        micro_batch_size: int,
        micro_batches_per_step: int,
        augment: bool,
    ) -> None:
        if micro_batch_size < 1 or micro_batches_per_step < 1:
            raise ValueError(
                f"micro_batch_size is {micro_batch_size}, micro_batches_per_step is {micro_batches_per_step};"
                " both must be at least 1."
            )
        global_batch = micro_batch_size * micro_batches_per_step * num_replicas
        self.steps_per_epoch = len(labels) // global_batch
        self.micro_batches_per_epoch = self.steps_per_epoch * micro_batches_per_step
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training set has {len(labels)} images, fewer than one global batch of {global_batch} "
                f"(micro-batch size {micro_batch_size} x micro-batches {micro_batches_per_step} x replicas "
                f"{num_replicas}), so an epoch has no step. Take more images or a smaller batch."
            )
        self._labels, self._seed, self._augment = labels, seed, augment
        self._global_batch, self._micro_batch_size = global_batch, micro_batch_size
        self._micro_batches_per_step = micro_batches_per_step
        self._first = replica * micro_batch_size * micro_batches_per_step
        self._drawn: tuple[int, Rows] | None = None

    def rows(self, position: int) -> Rows:
        """Returns the rows of micro-batch `position` of the run."""
        epoch, within = divmod(position, self.micro_batches_per_epoch)
        step, micro_batch = divmod(within, self._micro_batches_per_step)
        start = step * self._global_batch + self._first + micro_batch * self._micro_batch_size
        part = slice(start, start + self._micro_batch_size)
        whole = self._epoch(epoch)
        return Rows(whole.indices[part], whole.top[part], whole.left[part], whole.flip[part], whole.labels[part])

    def _epoch(self, epoch: int) -> Rows:
        """All rows of an epoch; the last one drawn is kept."""
        drawn = self._drawn
        if drawn is None or drawn[0] != epoch:
            drawn = epoch, self._draw(epoch)
            self._drawn = drawn
        return drawn[1]

    def _draw(self, epoch: int) -> Rows:
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
        count = len(self._labels)
        indices = rng.permutation(count)
        top, left = rng.integers(0, 2 * PADDING, size=(2, count), endpoint=True)
        flip = rng.random(count) < 0.5
        if not self._augment:
            top, left, flip = np.zeros_like(top), np.zeros_like(left), np.zeros_like(flip)
        return Rows(indices, top, left, flip, self._labels[indices])


class TestPlan:
    """A contiguous share of the test images, filled up to whole batches; past the end it starts anew."""

    __test__ = False  # not a test of pytest's

    def __init__(self, labels: NDArray[np.int64], *, start: int, share: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.num_batches = -(-share // batch_size)
        self._labels, self._start, self._stop = labels, start, min(start + share, len(labels))

    def rows(self, position: int) -> Rows:
        """Returns the rows of batch `position`."""
        first = self._start + position % self.num_batches * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        real = numbers < self._stop
        indices = np.where(real, numbers, 0)
        labels = np.where(real, self._labels[indices], -1)
        zeros = np.zeros_like(indices)
        return Rows(indices, zeros, zeros, np.zeros(len(indices), dtype=np.bool_), labels)


def make_loader(name: str, job: LoaderJob, *, workers: int) -> Loader:
    """Makes a loader by its name.

    Raises:
        ConfigError: if the name is unknown, the loader is not installed, or it has no worker processes.
    """
    return _LOADERS[_known(name)](job, workers)


def _known(name: str) -> str:
    if name not in _LOADERS:
        raise ConfigError(f"dsaux.data.loader is {show(name)}; it must be one of {', '.join(_LOADERS)}. Change it.")
    if name == "dali":
        require_dali()
    return name


def _make_dali_loader(job: LoaderJob, workers: int) -> Loader:
    from dsaux.data.dali import DaliLoader

    refuse_dali_workers(workers)
    return DaliLoader(job)


def _make_torch_loader(job: LoaderJob, workers: int) -> Loader:
    from dsaux.data.torch_loader import InProcessLoader, WorkerLoader

    return WorkerLoader(job, workers=workers) if workers else InProcessLoader(job)


_LOADERS: Mapping[str, Callable[[LoaderJob, int], Loader]] = {
    "dali": _make_dali_loader,
    "torch": _make_torch_loader,
}


def _check_share(replica: int, *, num_replicas: int) -> None:
    if not 0 <= replica < num_replicas:
        raise ValueError(f"replica is {replica} but there are {num_replicas}; it must be in 0 .. {num_replicas - 1}.")
