"""Loader "dali": an NVIDIA DALI pipeline crops, flips and normalises ahead of the training, on CPU or GPU.

stream.py picks it by name. Nothing in the pipeline is random: what a batch is made of comes with the images.

    external_source (padded images, top, left, flip, labels) -> crop_mirror_normalize -> inputs, labels

The source runs in the thread that asks for a batch; DALI's own threads do the work of the next PREFETCH
batches while that thread trains.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from dsaux.config_rules import ConfigError
from dsaux.data.stream import Batch, LoaderJob

PREFETCH = 2
"""Batches that DALI makes ahead."""

_MOST_THREADS = 4


class DaliLoader:
    """Loads batches with a DALI pipeline, which is built with the first batch.

    Args:
        job: what to load.
        num_threads: CPU threads of the pipeline; None takes as many as PyTorch has, at most 4.

    Raises:
        ConfigError: if DALI cannot be imported.
    """

    def __init__(self, job: LoaderJob, *, num_threads: int | None = None) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except (ImportError, OSError) as error:
            raise ConfigError(
                f'dsaux.data.loader is "dali" but NVIDIA DALI cannot be imported: {error}. Reinstall it with '
                "pip install 'dsaux[dali-cu13]' (or dali-cu12), or set dsaux.data.loader to \"torch\"."
            ) from error
        self._job = job
        self._num_threads = num_threads or min(torch.get_num_threads(), _MOST_THREADS)
        self._on_gpu = job.device.type == "cuda"
        self._position = 0  # of the next batch that the source hands to the pipeline
        self._pipeline: Any = None
        self._generation = 0
        self._under_way: deque[int] = deque()  # generations of the batches inside the pipeline, oldest first

    def seek(self, position: int) -> None:
        """Go on at this position; what the pipeline has under way is thrown away by the next `load`."""
        self._position = position
        self._generation += 1

    def load(self) -> Batch:
        """Returns the next batch."""
        if self._pipeline is None:
            self._pipeline = self._build()
        while True:
            # With a stream, DALI orders its buffers' reuse after the work that PyTorch queued on that stream.
            stream = torch.cuda.current_stream(self._job.device) if self._on_gpu else None
            outputs = self._pipeline.run(stream)
            if self._under_way.popleft() == self._generation:
                break
        # DALI's dynamic executor gives an output its own memory: DLPack hands it over without a copy.
        inputs, labels = (from_dlpack(output.as_tensor()) for output in outputs)
        return inputs, labels

    def close(self) -> None:
        """End the pipeline and its threads; `seek` before loading again."""
        self._pipeline = None
        self._under_way.clear()

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        job = self._job
        pipeline = Pipeline(
            batch_size=job.batch_size,
            num_threads=self._num_threads,
            device_id=_device_index(job.device) if self._on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,
        )
        with pipeline:
            images, top, left, flip, labels = fn.external_source(
                source=self._next_rows, num_outputs=5, batch=True, layout=["HWC", "", "", "", ""]
            )
            inputs = fn.crop_mirror_normalize(
                images.gpu() if self._on_gpu else images,
                crop=job.crop,
                crop_pos_x=left,
                crop_pos_y=top,
                mirror=flip,
                mean=list(job.mean),
                std=list(job.std),
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            pipeline.set_outputs(inputs, labels.gpu() if self._on_gpu else labels)
        pipeline.build()
        return pipeline

    def _next_rows(self) -> tuple[NDArray[Any], ...]:
        """Images of the next position, and how to treat them; a crop's start goes from 0 to 1."""
        rows = self._job.plan.rows(self._position)
        self._position += 1
        self._under_way.append(self._generation)
        margin = max(self._job.margin, 1)
        return (
            self._job.images[rows.indices],
            (rows.top / margin).astype(np.float32),
            (rows.left / margin).astype(np.float32),
            rows.flip.astype(np.int32),
            rows.labels,
        )


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
