"""Which image goes where: the endless stream of a replica's micro-batches, and the batches of an evaluation.

The trainer reads both. All ranks of a replica make the same stream on their own: order, crops and flips of an
epoch are drawn from (seed, epoch) alone, so nothing has to be sent, and any position can be reached without
replaying the ones before. Step t of an epoch takes the t-th global batch of the epoch's permutation, here
with 2 replicas x 3 micro-batches:

    global batch    |------------- replica 0 ------------|------------- replica 1 ------------|
    micro-batches   |     0     |     1     |     2      |     0     |     1     |     2      |

The same image is thus augmented in the same way whatever the number of replicas and micro-batches. A data set makes a
loader for a plan, which says for any position which samples make up its batch and what was drawn for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsaux.config_rules import ConfigError, show
from dsaux.data import refuse_dali_workers, require_dali
from dsaux.data.augment import Augmentation, Draws
from dsaux.models.shapes import SampleSpec

if TYPE_CHECKING:  # node_share.py imports this file
    from dsaux.data.node_share import NodeGroup

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs, for images float32 (B, C, H, W), normalised, and labels, int64 (B,), below 0 for padding."""


@dataclass(frozen=True)
class Rows:
    """What one batch is made of.

    Attributes:
        indices: samples of the data set, by index; shape (B,).
        is_real: False for the padding of an evaluation's last batch; shape (B,).
        draws: how each is augmented, by name; the first axis is the sample.
    """

    indices: NDArray[np.int64]
    is_real: NDArray[np.bool_]
    draws: Draws

    def labels(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels of the samples, -1 for padding.

        Args:
            labels: of the whole data set.
        """
        return np.where(self.is_real, labels[self.indices], -1)


class Plan(Protocol):
    """Says what the batch at any position >= 0 is made of."""

    def rows(self, position: int) -> Rows:
        """Returns the rows of one batch, the same ones whenever it is asked."""
        ...


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made, whatever they hold.

    Attributes:
        name: loader, "dali" or "torch".
        batch_size: samples in a batch.
        device: where the batches are put.
        workers: worker processes of the torch loader; 0 loads in this process.
        num_batches: batches that will be asked for, so that workers load no others; None for a stream without end.
    """

    name: str
    batch_size: int
    device: torch.device
    workers: int = 0
    num_batches: int | None = None


class Dataset(Protocol):
    """What is trained on.

    Attributes:
        name: name of the data set.
        num_classes: number of classes.
        classes: their names in the order of the labels; None where they have none.
        input_spec: what one sample of a batch is.
        num_train: samples to train on.
        num_test: samples to test with.
        mean: what was subtracted from each channel, in units of 0 .. 255.
        std: what each channel was divided by after that.
        shorter_side: what the shorter side of a test image is resized to before its middle is cut out; None where
            test images have the network's size.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def input_spec(self) -> SampleSpec: ...

    @property
    def num_train(self) -> int: ...

    @property
    def num_test(self) -> int: ...

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    @property
    def shorter_side(self) -> int | None: ...

    def augmentation(self, *, is_on: bool) -> Augmentation:
        """What is drawn for a training sample, or for one that is taken as it is."""
        ...

    def train_loader(self, plan: Plan, settings: LoaderSettings, *, augment: bool) -> Loader:
        """Makes the batches of a plan over the training samples."""
        ...

    def test_loader(self, plan: Plan, settings: LoaderSettings) -> Loader:
        """Makes the batches of a plan over the test samples."""
        ...


@dataclass(frozen=True, eq=False)
class LoaderJob:
    """All that a loader of images in memory needs to know.

    Attributes:
        images: uint8, shape (N, H + margin, W + margin, C).
        labels: int64, shape (N,).
        plan: what each batch is made of.
        batch_size: images in each batch.
        margin: rows and columns by which the images are larger than the crops.
        mean: per channel, in units of 0 .. 255.
        std: per channel, in units of 0 .. 255.
        device: where the batches are put.
        cutout: whether boxes are drawn that are to be greyed out.
        rand_augment: whether maps of colours and places are drawn.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    plan: Plan
    batch_size: int
    margin: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    cutout: bool = False
    rand_augment: bool = False

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
        dataset: what to train on.
        loader: "dali" or "torch".
        seed: order and augmentation are drawn from this and the epoch.
        replica: which replica, 0 .. num_replicas - 1.
        num_replicas: replicas that share the data.
        micro_batch_size: images in a micro-batch.
        micro_batches_per_step: micro-batches of this replica in a step.
        device: where the batches are put.
        workers: worker processes of the torch loader; 0 loads in this process.
        augment: random crops and flips; without, the images come as they are, but in random order still.
        share: the ranks of this replica on this host, of which one makes the batches for all; None makes them here.

    Attributes:
        steps_per_epoch: whole global batches in the training set.
        micro_batches_per_epoch: micro-batches of this replica in an epoch.

    Raises:
        ValueError: if a size is not positive, the replica does not exist, or an epoch has no step.
        ConfigError: if the loader is unknown or not installed.
    """

    def __init__(
        self,
        dataset: Dataset,
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
        share: NodeGroup | None = None,
    ) -> None:
        _check_share(replica, num_replicas=num_replicas)
        plan = TrainPlan(
            dataset.num_train,
            augmentation=dataset.augmentation(is_on=augment),
            seed=seed,
            replica=replica,
            num_replicas=num_replicas,
            micro_batch_size=micro_batch_size,
            micro_batches_per_step=micro_batches_per_step,
        )
        self.steps_per_epoch = plan.steps_per_epoch
        self.micro_batches_per_epoch = plan.micro_batches_per_epoch
        settings = LoaderSettings(known_loader(loader), micro_batch_size, torch.device(device), workers)
        self._loader: Loader
        if share is None:
            self._loader = dataset.train_loader(plan, settings, augment=augment)
        else:
            self._loader = _shared_loader(share, dataset=dataset, plan=plan, settings=settings, augment=augment)
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

    def begin(self) -> None:
        """Say where this rank will read first; ranks that share a host's batches wait for each other's word."""
        if hasattr(self._loader, "begin"):
            self._loader.begin()

    def leave(self) -> None:
        """Read no more: no rank that shares a host's batches has to wait for this one."""
        if hasattr(self._loader, "leave"):
            self._loader.leave()

    def close(self) -> None:
        """End the loader's threads and processes; reading on starts them again, unless the batches are shared."""
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

    def __init__(self, make_loader: Callable[[], Loader], *, num_batches: int) -> None:
        self._make_loader, self._num_batches = make_loader, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        loader = self._make_loader()
        try:
            for _ in range(self._num_batches):
                yield loader.load()
        finally:
            loader.close()


def test_batches(
    dataset: Dataset,
    *,
    loader: str,
    replica: int,
    num_replicas: int,
    batch_size: int,
    device: torch.device | str,
    workers: int = 0,  # noqa: PT028  # not a test of pytest's
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
        workers: most worker processes of the torch loader, which start and end with an iteration; 0 loads in this
            process, as images in memory always are.

    Returns:
        An object with a length, which can be iterated any number of times.

    Raises:
        ValueError: if the batch size is not positive, the replica does not exist, or the test set is empty.
        ConfigError: if the loader is unknown or not installed.
    """
    _check_share(replica, num_replicas=num_replicas)
    if batch_size < 1 or not dataset.num_test:
        raise ValueError(
            f"batch_size is {batch_size} and the test set has {dataset.num_test} samples; both must be at least 1."
        )
    share = -(-dataset.num_test // num_replicas)
    plan = TestPlan(
        dataset.num_test,
        augmentation=dataset.augmentation(is_on=False),
        start=replica * share,
        share=share,
        batch_size=min(batch_size, share),
    )
    settings = LoaderSettings(
        known_loader(loader),
        plan.batch_size,
        torch.device(device),
        workers=min(workers, plan.num_batches),
        num_batches=plan.num_batches,
    )
    return TestBatches(lambda: dataset.test_loader(plan, settings), num_batches=plan.num_batches)


test_batches.__test__ = False  # type: ignore[attr-defined]  # not a test of pytest's


class TrainPlan:
    """Order and augmentation of the training samples; arguments as for `ReplicaStream`."""

    def __init__(
        self,
        num_samples: int,
        *,
        augmentation: Augmentation,
        seed: int,
        replica: int,
        num_replicas: int,
        micro_batch_size: int,
        micro_batches_per_step: int,
    ) -> None:
        if micro_batch_size < 1 or micro_batches_per_step < 1:
            raise ValueError(
                f"micro_batch_size is {micro_batch_size}, micro_batches_per_step is {micro_batches_per_step};"
                " both must be at least 1."
            )
        global_batch = micro_batch_size * micro_batches_per_step * num_replicas
        self.steps_per_epoch = num_samples // global_batch
        self.micro_batches_per_epoch = self.steps_per_epoch * micro_batches_per_step
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training set has {num_samples} samples, fewer than one global batch of {global_batch} "
                f"(micro-batch size {micro_batch_size} x micro-batches {micro_batches_per_step} x replicas "
                f"{num_replicas}), so an epoch has no step. Take more samples or a smaller batch."
            )
        self._num_samples, self._seed, self._augmentation = num_samples, seed, augmentation
        self._global_batch, self._micro_batch_size = global_batch, micro_batch_size
        self._micro_batches_per_step = micro_batches_per_step
        self._first = replica * micro_batch_size * micro_batches_per_step
        self._drawn: tuple[int, NDArray[np.int64], Draws] | None = None

    def rows(self, position: int) -> Rows:
        """Returns the rows of micro-batch `position` of the run."""
        epoch, within = divmod(position, self.micro_batches_per_epoch)
        step, micro_batch = divmod(within, self._micro_batches_per_step)
        start = step * self._global_batch + self._first + micro_batch * self._micro_batch_size
        part = slice(start, start + self._micro_batch_size)
        indices, draws = self._epoch(epoch)
        indices = indices[part]
        return Rows(indices, np.ones(len(indices), dtype=np.bool_), {name: draw[part] for name, draw in draws.items()})

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], Draws]:
        """Order and draws of an epoch; the last one drawn is kept."""
        if self._drawn is None or self._drawn[0] != epoch:
            rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
            self._drawn = epoch, rng.permutation(self._num_samples), self._augmentation.draw(rng, self._num_samples)
        return self._drawn[1:]


class TestPlan:
    """A contiguous share of the test samples, filled up to whole batches; past the end it starts anew."""

    __test__ = False  # not a test of pytest's

    def __init__(
        self, num_samples: int, *, augmentation: Augmentation, start: int, share: int, batch_size: int
    ) -> None:
        self.batch_size = batch_size
        self.num_batches = -(-share // batch_size)
        self._start, self._stop = start, min(start + share, num_samples)
        self._draws = augmentation.draw(np.random.default_rng(0), batch_size)

    def rows(self, position: int) -> Rows:
        """Returns the rows of batch `position`."""
        first = self._start + position % self.num_batches * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        real = numbers < self._stop
        return Rows(np.where(real, numbers, 0), real, self._draws)


def make_loader(name: str, job: LoaderJob, *, workers: int) -> Loader:
    """Makes a loader by its name.

    Raises:
        ConfigError: if the name is unknown, the loader is not installed, or it has no worker processes.
    """
    return _LOADERS[known_loader(name)](job, workers)


def known_loader(name: str) -> str:
    """The name of a loader, if there is one of it here.

    Raises:
        ConfigError: if the name is unknown or the loader is not installed.
    """
    if name not in _LOADERS:
        raise ConfigError(f"dsaux.data.loader is {show(name)}; it must be one of {', '.join(_LOADERS)}. Change it.")
    if name == "dali":
        require_dali()
    return name


def _shared_loader(
    share: NodeGroup, *, dataset: Dataset, plan: Plan, settings: LoaderSettings, augment: bool
) -> Loader:
    from dsaux.data.node_share import BatchForm, SharedLoader

    spec = dataset.input_spec
    form = BatchForm(spec, spec.shape if spec.vocabulary else (), settings.batch_size)
    on_cpu = replace(settings, device=torch.device("cpu"))
    return SharedLoader(
        share,
        form=form,
        make_loader=lambda: dataset.train_loader(plan, on_cpu, augment=augment),
        device=settings.device,
    )


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
