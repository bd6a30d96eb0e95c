"""Loader "dali" for image files: an NVIDIA DALI pipeline decodes, cuts, resizes and normalises, on CPU or GPU.

files.py picks it by name. As in dali.py nothing in the pipeline is random:

    external_source (bytes, window, ...) -> decoders.image_slice -> resize -> color_twist -> crop_mirror_normalize

Threads read the files of the next batches ahead, and take each image's size from its header: the window depends on it.
DALI decodes the window alone, which gives the pixels of the whole image's decoding in less time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dsaux.data.dali import PREFETCH, PipelineLoader
from dsaux.data.files import FileJob, Split
from dsaux.data.pictures import DamagedImageError, decode, image_size_of, is_cut_jpeg
from dsaux.data.stream import Batch, Rows
from dsaux.data.views import Views

_READ_AHEAD = 2
"""Batches whose files are read beside those that DALI has under way."""


class _Reading(NamedTuple):
    """A batch whose files are being read."""

    rows: Rows
    numbers: list[int]
    files: list[Future[tuple[bytes, tuple[int, int]]]]


class DaliFileLoader(PipelineLoader):
    """Loads batches of image files with a DALI pipeline, which is built with the first batch.

    Args:
        job: what to load.
        num_threads: CPU threads of the pipeline, and threads that read; None takes as many as PyTorch has, at most 4.

    Raises:
        ConfigError: if DALI cannot be imported.
    """

    def __init__(self, job: FileJob, *, num_threads: int | None = None) -> None:
        super().__init__(job.device, num_threads=num_threads)
        self._job = job
        self._labels = job.split.labels[job.subset]
        self._reading: deque[_Reading] = deque()
        self._recent: deque[list[int]] = deque(maxlen=PREFETCH + 2)  # images of the batches inside the pipeline
        self._readers: ThreadPoolExecutor | None = None

    def seek(self, position: int) -> None:
        """Go on at this position; what was read ahead is thrown away."""
        super().seek(position)
        for batch in self._reading:
            for file in batch.files:
                file.cancel()
        self._reading.clear()

    def load(self) -> Batch:
        """Returns the next batch.

        Raises:
            DamagedImageError: if an image of this batch, or of one made ahead, cannot be used; names its file.
        """
        try:
            return super().load()
        except DamagedImageError:
            self.close()
            raise
        except RuntimeError:
            recent = [number for numbers in self._recent for number in numbers]
            self.close()
            _name_culprit(self._job.split, dict.fromkeys(recent))
            raise

    def close(self) -> None:
        """End the pipeline and all threads; `seek` before loading again."""
        super().close()
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
            self._readers = None
        self._reading.clear()
        self._recent.clear()

    def _build(self) -> Any:
        from nvidia.dali import fn, types

        job = self._job
        pipeline = self._new_pipeline(job.batch_size)
        with pipeline:
            files, corner, extent, resized, y, x, flip, labels, *color = fn.external_source(
                source=self._next_rows, num_outputs=11 if job.augmentation.has_color() else 8, batch=True
            )
            images = fn.decoders.image_slice(
                files,
                device="mixed" if self._on_gpu else "cpu",
                start=corner,
                shape=extent,
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=False,
            )
            images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
            if color:
                brightness, contrast, saturation = color
                images = fn.color_twist(images, brightness=brightness, contrast=contrast, saturation=saturation)
            inputs = fn.crop_mirror_normalize(
                images,
                crop=(job.image_size, job.image_size),
                crop_pos_y=y,
                crop_pos_x=x,
                mirror=flip,
                mean=list(job.mean),
                std=list(job.std),
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            pipeline.set_outputs(inputs, labels.gpu() if self._on_gpu else labels)
        pipeline.build()
        return pipeline

    def _next_rows(self) -> tuple[Any, ...]:
        """Encoded images of the next position, and how to treat them; a crop's start goes from 0 to 1."""
        job = self._job
        while len(self._reading) <= _READ_AHEAD:
            self._reading.append(self._start_reading(self._position + len(self._reading)))
        batch = self._reading.popleft()
        self._position += 1
        self._under_way.append(self._generation)
        self._recent.append(batch.numbers)
        files = [file.result() for file in batch.files]
        sizes = np.array([size for _, size in files], dtype=np.int64)
        views = job.augmentation.views(batch.rows.draws, sizes, image_size=job.image_size)
        room = np.maximum(views.resized - job.image_size, 1)
        start = (views.crop / room).astype(np.float32)
        return (
            [np.frombuffer(data, dtype=np.uint8) for data, _ in files],
            views.window[:, :2].astype(np.int32),
            views.window[:, 2:].astype(np.int32),
            views.resized.astype(np.float32),
            start[:, 0].copy(),
            start[:, 1].copy(),
            views.flip.astype(np.int32),
            batch.rows.labels(self._labels),
            *_columns(views),
        )

    def _start_reading(self, position: int) -> _Reading:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="dsaux-read")
        rows = self._job.plan.rows(position)
        numbers = self._job.subset[rows.indices].tolist()
        return _Reading(rows, numbers, [self._readers.submit(_read, self._job.split, number) for number in numbers])


def _columns(views: Views) -> list[Any]:
    return [] if views.color is None else [column.copy() for column in views.color.T]


def _read(split: Split, number: int) -> tuple[bytes, tuple[int, int]]:
    """An encoded image, and its height and width.

    Raises:
        DamagedImageError: if it cannot be read, is no image, or a JPEG without an end that PIL cannot decode either.
    """
    where = partial(split.where, number)
    try:
        data = split.read(number)
    except OSError as error:
        raise DamagedImageError.of(where(), error) from error
    if is_cut_jpeg(data):
        decode(data, where=where)
    return data, image_size_of(data, where=where)


def _name_culprit(split: Split, numbers: Iterable[int]) -> None:
    """Looks for what ended a pipeline; it returns if all these images are good, and the reason is another one.

    Raises:
        DamagedImageError: for the first image that PIL, or else DALI alone, cannot decode.
    """
    decoder = _one_image_decoder()
    for number in numbers:
        data, _ = _read(split, number)
        decode(data, where=partial(split.where, number))
        decoder.feed_input("file", [np.frombuffer(data, dtype=np.uint8)])
        try:
            decoder.run()
        except RuntimeError as error:
            reason = 'DALI cannot decode it, but PIL can, which dsaux.data.loader "torch" uses'
            raise DamagedImageError.of(split.where(number), reason) from error


def _one_image_decoder() -> Any:
    """A pipeline on the CPU, where no trouble of a GPU is taken for an image's."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        file = fn.external_source(name="file")
        pipeline.set_outputs(fn.decoders.image(file, device="cpu", output_type=types.RGB, adjust_orientation=False))
    pipeline.build()
    return pipeline
