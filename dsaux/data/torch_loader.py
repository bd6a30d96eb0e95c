"""Loader "torch": crop, flip and normalise with NumPy and PyTorch, in this process or in worker processes.

stream.py picks it by name. A crop is a view into the padded image, so a batch is one gather out of

    windows[image, top, left] -> (C, H, W)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dsaux.data.stream import Batch, LoaderJob

WORKER_TIMEOUT_S = 120
"""A worker that is silent for so long is taken for hung. One that dies is noticed at once."""


class InProcessLoader:
    """Loads each batch when it is asked for.

    Args:
        job: what to load.
    """

    def __init__(self, job: LoaderJob) -> None:
        self._crops, self._normalise = _Crops(job), _Normalise(job)
        self._position = 0

    def seek(self, position: int) -> None:
        """Go on at this position."""
        self._position = position

    def load(self) -> Batch:
        """Returns the next batch."""
        batch = self._crops[self._position]
        self._position += 1
        return self._normalise(batch)

    def close(self) -> None:
        """Nothing to end."""


class WorkerLoader:
    """Loads ahead in worker processes, which start with the first batch.

    Args:
        job: what to load.
        workers: number of worker processes, at least 1.
    """

    def __init__(self, job: LoaderJob, *, workers: int) -> None:
        self._crops, self._normalise = _Crops(job), _Normalise(job)
        self._workers, self._pinned = workers, job.device.type == "cuda"
        self._position = 0
        self._batches: Iterator[Batch] | None = None

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
            batch = next(self._batches)
        except (EOFError, ConnectionError) as error:
            self.close()
            raise RuntimeError(
                "a worker process of the torch loader ended before it had handed over its batch (killed, or out of "
                "memory). Start the run again, with fewer dsaux.data.workers if memory is short."
            ) from error
        except BaseException:
            self.close()  # else PyTorch raises the death of a worker again with every child process that ends
            raise
        self._position += 1
        return self._normalise(batch)

    def close(self) -> None:
        """End the workers."""
        self._batches = None  # PyTorch ends them with their iterator

    def _data_loader(self) -> DataLoader[Batch]:
        return DataLoader(
            self._crops,
            batch_size=None,  # the sampler's item is the position of a whole batch
            sampler=_PositionsFrom(self._position),
            num_workers=self._workers,
            # Not forked from here: a copy of a process with threads (DeepSpeed's, gloo's, DALI's) can crash.
            multiprocessing_context="forkserver",
            timeout=WORKER_TIMEOUT_S,
            pin_memory=self._pinned,
            generator=torch.Generator(),  # workers' seeds, unused, are else drawn from the global one
        )


class _PositionsFrom(Sampler[int]):
    """start, start + 1, .. without end."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


class _Crops(Dataset[Batch]):
    """The batches of a job by position: crops as uint8 (B, C, H, W), and labels."""

    def __init__(self, job: LoaderJob) -> None:
        self._images, self._plan, self._crop = job.images, job.plan, job.crop

    def __getitem__(self, position: int) -> Batch:
        rows = self._plan.rows(position)
        windows: NDArray[Any] = sliding_window_view(self._images, self._crop, axis=(1, 2))
        crops = np.ascontiguousarray(windows[rows.indices, rows.top, rows.left])
        crops[rows.flip] = crops[rows.flip, ..., ::-1]
        return torch.from_numpy(crops), torch.tensor(rows.labels)


class _Normalise:
    """Moves a batch to the job's device and normalises its images there."""

    def __init__(self, job: LoaderJob) -> None:
        self._device = job.device
        self._mean = torch.tensor(job.mean, dtype=torch.float32, device=job.device).reshape(-1, 1, 1)
        self._std = torch.tensor(job.std, dtype=torch.float32, device=job.device).reshape(-1, 1, 1)

    def __call__(self, batch: tuple[Tensor, Tensor]) -> Batch:
        crops, labels = (part.to(self._device, non_blocking=True) for part in batch)
        return crops.float().sub_(self._mean).div_(self._std), labels
