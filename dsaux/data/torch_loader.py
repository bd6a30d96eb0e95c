"""Loader "torch": crop, flip and normalise with NumPy and PyTorch, in this process or in worker processes.

stream.py picks it by name. A crop is a view into the padded image, so a batch is one gather out of

    windows[image, top, left] -> (C, H, W)

The rest, colours, normalisation, places and Cutout, is done on the job's device; on the CPU worker processes do it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dsaux.data.apply import erase, recolour, warp
from dsaux.data.augment import Draws
from dsaux.data.stream import Batch, LoaderJob

WORKER_TIMEOUT_S = 120
"""A worker that is silent for so long is taken for hung."""
LOOK_S = 2
"""How often it is looked, while a batch is awaited, whether the workers live: of a death the server is told that has
forked them, and not this process."""


class NormalisedJob(Protocol):
    """What is known of any job whose samples are images.

    Attributes:
        mean: per channel, in units of 0 .. 255.
        std: per channel, in units of 0 .. 255.
        device: where the batches are put.
    """

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    @property
    def device(self) -> torch.device: ...


class InProcessLoader:
    """Loads each batch when it is asked for.

    Args:
        job: what to load.
        samples: its batches by position, before they are normalised; None takes those of images in memory.
    """

    def __init__(self, job: NormalisedJob, *, samples: Dataset[Cropped] | None = None) -> None:
        self._crops, self._finish = samples or _crops_of(job), _Finish(job)
        self._position = 0

    def seek(self, position: int) -> None:
        """Go on at this position."""
        self._position = position

    def load(self) -> Batch:
        """Returns the next batch."""
        batch = self._crops[self._position]
        self._position += 1
        return self._finish(*batch)

    def close(self) -> None:
        """Nothing to end."""


class WorkerLoader:
    """Loads ahead in worker processes, which start with the first batch.

    Args:
        job: what to load.
        workers: number of worker processes, at least 1.
        samples: its batches by position, before they are normalised; None takes those of images in memory.
        num_batches: no batch from this position on is loaded ahead; None for a stream without end.
    """

    def __init__(
        self,
        job: NormalisedJob,
        *,
        workers: int,
        samples: Dataset[Cropped] | None = None,
        num_batches: int | None = None,
    ) -> None:
        crops, finish = samples or _crops_of(job), _Finish(job)
        self._workers, self._pinned = workers, job.device.type == "cuda"
        self._num_batches = num_batches
        # What is drawn beyond crops is work for the workers; else bytes cost less on their way than float32.
        in_workers = job.device.type == "cpu" and isinstance(job, LoaderJob) and (job.rand_augment or job.cutout)
        self._dataset: Dataset[Any] = _Finished(crops, finish) if in_workers else crops
        self._finish = None if in_workers else finish
        self._position = 0
        self._batches: Iterator[Any] | None = None

    def seek(self, position: int) -> None:
        """Go on at this position with new workers."""
        self.close()
        self._position = position

    def load(self) -> Batch:
        """Returns the next batch.

        Raises:
            RuntimeError: if a worker died or is silent for WORKER_TIMEOUT_S.
        """
        if self._batches is None:
            self._batches = iter(self._data_loader())
        try:
            batch = self._await_batch(self._batches)
        except (EOFError, ConnectionError) as error:
            self.close()
            raise _worker_is_gone() from error
        except BaseException:
            self.close()  # else PyTorch raises the death of a worker again with every child process that ends
            raise
        self._position += 1
        inputs, labels = batch if self._finish is None else self._finish(*batch)
        return inputs, labels

    def _await_batch(self, batches: Iterator[Any]) -> Any:
        deadline = time.monotonic() + WORKER_TIMEOUT_S
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if "exited unexpectedly" in str(error):
                    raise _worker_is_gone() from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the worker processes of the torch loader have been silent for {WORKER_TIMEOUT_S} s. Look at "
                        "the disk that holds the images, or set dsaux.data.workers to 0."
                    ) from error

    def close(self) -> None:
        """End the workers."""
        self._batches = None  # PyTorch ends them with their iterator

    def _data_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._dataset,
            batch_size=None,  # the sampler's item is the position of a whole batch
            sampler=_Positions(self._position, self._num_batches),
            num_workers=self._workers,
            # Not forked from here: a copy of a process with threads (DeepSpeed's, gloo's, DALI's) can crash.
            multiprocessing_context="forkserver",
            timeout=LOOK_S,
            pin_memory=self._pinned,
            generator=torch.Generator(),  # workers' seeds, unused, are else drawn from the global one
        )


def _worker_is_gone() -> RuntimeError:
    return RuntimeError(
        "a worker process of the torch loader ended before it had handed over its batch (killed, or out of memory). "
        "Start the run again, with fewer dsaux.data.workers if memory is short."
    )


class _Positions(Sampler[int]):
    """start, start + 1, .. up to stop; without end where that is None."""

    def __init__(self, start: int, stop: int | None) -> None:
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start) if self._stop is None else iter(range(self._start, self._stop))


Cropped: TypeAlias = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Crops as uint8 (B, C, H, W), labels, and the draws that are yet to be applied."""

_LATER_DRAWS = ("colour", "warp", "erased")


def _crops_of(job: NormalisedJob) -> Dataset[Cropped]:
    assert isinstance(job, LoaderJob), "another job brings its samples"
    return _Crops(job)


class _Crops(Dataset[Cropped]):
    """The crops of a job by the position of their batch."""

    def __init__(self, job: LoaderJob) -> None:
        self._images, self._labels, self._plan, self._crop = job.images, job.labels, job.plan, job.crop

    def __getitem__(self, position: int) -> Cropped:
        rows = self._plan.rows(position)
        windows: NDArray[Any] = sliding_window_view(self._images, self._crop, axis=(1, 2))
        flip = rows.draws["flip"]
        crops = np.ascontiguousarray(windows[rows.indices, rows.draws["top"], rows.draws["left"]])
        crops[flip] = crops[flip, ..., ::-1]
        later = {name: torch.tensor(rows.draws[name]) for name in _LATER_DRAWS if name in rows.draws}
        return torch.from_numpy(crops), torch.tensor(rows.labels(self._labels)), later


class _Finish:
    """Moves a batch to the job's device, normalises its images there and applies the rest of the draws."""

    def __init__(self, job: NormalisedJob) -> None:
        self._device = job.device
        self._mean = torch.tensor(job.mean, dtype=torch.float32, device=job.device).reshape(-1, 1, 1)
        self._std = torch.tensor(job.std, dtype=torch.float32, device=job.device).reshape(-1, 1, 1)

    def __call__(self, crops: Tensor, labels: Tensor, later: Mapping[str, Tensor]) -> Batch:
        crops, labels = (part.to(self._device, non_blocking=True) for part in (crops, labels))
        draws: Draws = {name: draw.numpy() for name, draw in later.items()}
        images = crops.float()
        if "colour" in draws:
            images = recolour(images, draws["colour"])
        images.sub_(self._mean).div_(self._std)
        if "warp" in draws:
            images = warp(images, draws["warp"])
        if "erased" in draws:
            images = erase(images, draws["erased"])
        return images, labels


class _Finished(Dataset[Batch]):
    """The whole batches of a job by their position."""

    def __init__(self, crops: Dataset[Cropped], finish: _Finish) -> None:
        self._crops, self._finish = crops, finish

    def __getitem__(self, position: int) -> Batch:
        return self._finish(*self._crops[position])
