"""Loader "torch" for image files: PIL decodes, cuts and resizes, in this process or in worker processes.

files.py picks it by name. Order, failures and normalising are those of torch_loader.py.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

from dsaux.data.files import FileJob
from dsaux.data.pictures import DamagedImageError, decode, render
from dsaux.data.stream import Loader
from dsaux.data.torch_loader import Cropped, InProcessLoader, WorkerLoader


def make_torch_file_loader(job: FileJob, *, workers: int, num_batches: int | None) -> Loader:
    """Makes the loader.

    Args:
        job: what to load.
        workers: worker processes; 0 loads in this process.
        num_batches: batches that will be asked for; None for a stream without end.
    """
    samples = _Samples(job)
    if not workers:
        return InProcessLoader(job, samples=samples)
    return WorkerLoader(job, workers=workers, samples=samples, num_batches=num_batches)


class _Samples(Dataset[Cropped]):
    """The batches of a job by position: uint8 (B, 3, S, S), labels, and nothing that is yet to be applied."""

    def __init__(self, job: FileJob) -> None:
        self._job, self._labels = job, job.split.labels[job.subset]

    def __getitem__(self, position: int) -> Cropped:
        job = self._job
        rows = job.plan.rows(position)
        numbers = job.subset[rows.indices]
        images = []
        for number in numbers.tolist():
            where = partial(job.split.where, number)
            try:
                data = job.split.read(number)
            except OSError as error:
                raise DamagedImageError.of(where(), error) from error
            images.append(decode(data, where=where))
        sizes = np.array([(image.height, image.width) for image in images], dtype=np.int64)
        views = job.augmentation.views(rows.draws, sizes, image_size=job.image_size)
        pixels = np.stack([render(image, views, row, image_size=job.image_size) for row, image in enumerate(images)])
        samples = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return samples, torch.tensor(rows.labels(self._labels)), {}
