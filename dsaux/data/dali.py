"""Loader "dali": an NVIDIA DALI pipeline crops, flips and normalises ahead of the training, on CPU or GPU.

stream.py picks it by name. Nothing in the pipeline is random: what a batch is made of comes with the images.

    external_source (padded images, top, left, flip, labels) -> crop_mirror_normalize -> inputs, labels

With `rand_augment` there is a map of the colours between crop and normalisation, and one of the places behind it; with
`cutout` boxes are set to 0, the mean of the normalised images, at the end. Where both are off, nothing of it is built.

The source runs in the thread that asks for a batch; DALI's own threads do the work of the next PREFETCH
batches while that thread trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from dsaux.config_rules import ConfigError
from dsaux.data.augment import Draws
from dsaux.data.stream import Batch, LoaderJob

PREFETCH = 2
"""Batches that DALI makes ahead."""

_MOST_THREADS = 4


class PipelineLoader:
    """What all loaders with a DALI pipeline share; a subclass builds the pipeline, and feeds it out of `_position`.

    Args:
        device: where the batches are put.
        num_threads: CPU threads of the pipeline; None takes as many as PyTorch has, at most 4.

    Raises:
        ConfigError: if DALI cannot be imported.
    """

    def __init__(self, device: torch.device, *, num_threads: int | None) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except (ImportError, OSError) as error:
            raise ConfigError(
                f'dsaux.data.loader is "dali" but NVIDIA DALI cannot be imported: {error}. Reinstall it with '
                "pip install 'dsaux[dali-cu13]' (or dali-cu12), or set dsaux.data.loader to \"torch\"."
            ) from error
        self._device = device
        self._num_threads = num_threads or min(torch.get_num_threads(), _MOST_THREADS)
        self._on_gpu = device.type == "cuda"
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
            stream = torch.cuda.current_stream(self._device) if self._on_gpu else None
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
        raise NotImplementedError

    def _new_pipeline(self, batch_size: int) -> Any:
        """A pipeline without operators."""
        from nvidia.dali import Pipeline

        return Pipeline(
            batch_size=batch_size,
            num_threads=self._num_threads,
            device_id=_device_index(self._device) if self._on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,
        )


class DaliLoader(PipelineLoader):
    """Loads batches of images in memory with a DALI pipeline, which is built with the first batch.

    Args:
        job: what to load.
        num_threads: CPU threads of the pipeline; None takes as many as PyTorch has, at most 4.

    Raises:
        ConfigError: if DALI cannot be imported.
    """

    def __init__(self, job: LoaderJob, *, num_threads: int | None = None) -> None:
        super().__init__(job.device, num_threads=num_threads)
        self._job = job

    def _build(self) -> Any:
        from nvidia.dali import fn, math, types

        job = self._job
        pipeline = self._new_pipeline(job.batch_size)
        with pipeline:
            images, labels, top, left, flip, *later = fn.external_source(
                source=self._next_rows,
                num_outputs=5 + len(_later_inputs(job)),
                batch=True,
                layout=["HWC"] + [""] * (4 + len(_later_inputs(job))),
            )
            images, labels = (part.gpu() if self._on_gpu else part for part in (images, labels))
            crop: dict[str, Any] = {"crop": job.crop, "crop_pos_x": left, "crop_pos_y": top, "mirror": flip}
            scale: dict[str, Any] = {"mean": list(job.mean), "std": list(job.std)}
            drawn = dict(zip(_later_inputs(job), later, strict=True))
            if job.rand_augment:
                images = fn.crop_mirror_normalize(images, **crop, dtype=types.FLOAT, output_layout="HWC")
                images = fn.coord_transform(images, M=drawn["colour"], T=drawn["colour_shift"])
                images = fn.reshape(math.clamp(images, 0.0, 255.0), layout="HWC")
                images = fn.crop_mirror_normalize(images, **scale, dtype=types.FLOAT, output_layout="HWC")
                images = fn.warp_affine(images, matrix=drawn["warp"], fill_value=0.0, interp_type=types.INTERP_LINEAR)
                inputs = fn.transpose(images, perm=[2, 0, 1])
            else:
                inputs = fn.crop_mirror_normalize(images, **crop, **scale, dtype=types.FLOAT, output_layout="CHW")
            if job.cutout:
                inputs = fn.erase(
                    inputs, anchor=drawn["erased"], shape=drawn["erased_size"], axis_names="HW", fill_value=0.0
                )
            pipeline.set_outputs(inputs, labels)
        pipeline.build()
        return pipeline

    def _next_rows(self) -> tuple[NDArray[Any], ...]:
        """Images and labels of the next position, and how to treat them; a crop's start goes from 0 to 1."""
        rows = self._job.plan.rows(self._position)
        self._position += 1
        self._under_way.append(self._generation)
        margin = max(self._job.margin, 1)
        return (
            self._job.images[rows.indices],
            rows.labels(self._job.labels),
            (rows.draws["top"] / margin).astype(np.float32),
            (rows.draws["left"] / margin).astype(np.float32),
            rows.draws["flip"].astype(np.int32),
            *(np.ascontiguousarray(make(rows.draws), dtype=np.float32) for make in _later_inputs(self._job).values()),
        )


def _later_inputs(job: LoaderJob) -> dict[str, Callable[[Draws], NDArray[Any]]]:
    """Inputs of the pipeline behind the crop, each with how it is made of what was drawn."""
    inputs: dict[str, Callable[[Draws], NDArray[Any]]] = {}
    if job.rand_augment:
        inputs["colour"] = lambda draws: draws["colour"][:, :, :3]
        inputs["colour_shift"] = lambda draws: draws["colour"][:, :, 3]
        inputs["warp"] = lambda draws: draws["warp"]
    if job.cutout:
        inputs["erased"] = lambda draws: draws["erased"][:, :2]
        inputs["erased_size"] = lambda draws: draws["erased"][:, 2:] - draws["erased"][:, :2]
    return inputs


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
