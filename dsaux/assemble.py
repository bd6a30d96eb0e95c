"""From a checked configuration to an engine: cut the network, build the stage and the AuxNet, initialize DeepSpeed.

train.py calls these one after the other, when the process group stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from dsaux.bootstrap import initialize
from dsaux.checkpoint import FoundCheckpoint
from dsaux.config import Config, Launch, resolved_deepspeed
from dsaux.data import ImageDataset, ReplicaStream
from dsaux.engine import AuxPipelineEngine
from dsaux.engine_state import content_bounds
from dsaux.models import Layer, boundary_shapes, build_layers
from dsaux.models.auxnet import AuxNet, build_aux_net
from dsaux.module import AuxPipelineModule
from dsaux.partition import Partition, choose_bounds

T = TypeVar("T")
BATCHNORM_STREAM_SEED_OFFSET = 1_000_003
"""Added to the run's seed for the batches that re-estimate BatchNorm: another order than the training's own."""


def input_shape(dataset: ImageDataset) -> tuple[int, int, int]:
    """(channels, height, width) of one sample."""
    height, width, channels = dataset.train_images.shape[1:]
    return int(channels), int(height), int(width)


def agree_on_partition(
    config: Config,
    launch: Launch,
    *,
    layers: list[Layer],
    dataset: ImageDataset,
    device: torch.device,
    found: FoundCheckpoint | None,
) -> Partition:
    """Cut the layers into stages on rank 0 (it may measure times) and tell all ranks.

    Args:
        config: the checked configuration.
        launch: processes and batch sizes.
        layers: the whole network.
        dataset: for the shape of a sample.
        device: where to measure.
        found: on rank 0 the checkpoint that the run goes on from: measured anew, times would give another cut, so its
            own is kept where it has as many stages and the configuration gives no list.
    """
    settings = config.dsaux
    method: str | Sequence[int | str] = settings.pipeline.partition
    if found is not None and isinstance(method, str):
        bounds = content_bounds(found)
        method = bounds[1:-1] if len(bounds) == launch.stages + 1 and bounds[-1] == len(layers) else method
    chosen: list[Partition | None] = [None]
    if torch.distributed.get_rank() == 0:
        chosen[0] = choose_bounds(
            method,
            layers=layers,
            num_stages=launch.stages,
            input_shape=input_shape(dataset),
            aux_depth=settings.aux.depth,
            aux_width=settings.aux.width,
            aux_segment=settings.aux.segment,
            micro_batch_size=launch.micro_batch_size,
            device=device,
            with_aux=settings.pipeline.schedule != "1f1b",
            seed=settings.run.seed,
        )
    torch.distributed.broadcast_object_list(chosen, src=0)
    assert chosen[0] is not None
    return chosen[0]


def tell_all(value: T) -> T:
    """What rank 0 gives, on every rank; a collective call of all ranks."""
    values: list[Any] = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    told: T = values[0]
    return told


def build_engine(
    config: Config,
    launch: Launch,
    *,
    layers: list[Layer],
    dataset: ImageDataset,
    partition: Partition,
    main_steps: int,
) -> AuxPipelineEngine:
    """Build this rank's stage, the AuxNet and the engine.

    Args:
        config: the checked configuration.
        launch: processes, stages, replicas and batch sizes.
        layers: the whole network.
        dataset: for the shape of a sample.
        partition: the bounds that all ranks agreed on.
        main_steps: optimizer steps that the configured learning-rate schedule spans.

    Returns:
        The engine.
    """
    module = AuxPipelineModule(
        layers,
        num_stages=launch.stages,
        bounds=partition.bounds,
        loss_fn=cross_entropy,
        aux_net=_build_aux_net(config, layers, shape=input_shape(dataset), bounds=partition.bounds),
        seed=config.dsaux.run.seed,
    )
    document = resolved_deepspeed(config, launch, total_steps=main_steps)
    engine, _, _, _ = initialize(model=module, config=document)
    return engine


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of scores (B, classes), computed in float32 at least."""
    return F.cross_entropy(outputs if outputs.dtype == torch.float64 else outputs.float(), labels)


def network_layers(config: Config, dataset: ImageDataset) -> list[Layer]:
    """The configured network for this data set's classes, as a list of named layers."""
    return build_layers(config.dsaux.model.name, num_classes=dataset.num_classes, in_channels=input_shape(dataset)[0])


def training_stream(
    config: Config, launch: Launch, *, dataset: ImageDataset, replica: int, device: torch.device
) -> ReplicaStream:
    """The endless stream of training micro-batches of one replica."""
    settings = config.dsaux
    return ReplicaStream(
        dataset,
        loader=settings.data.loader,
        seed=settings.run.seed,
        replica=replica,
        num_replicas=launch.replicas,
        micro_batch_size=launch.micro_batch_size,
        micro_batches_per_step=launch.gradient_accumulation_steps,
        device=device,
        workers=settings.data.workers,
        augment=settings.data.augment,
    )


def batchnorm_stream(
    config: Config, launch: Launch, *, dataset: ImageDataset, replica: int, device: torch.device
) -> ReplicaStream:
    """Training images in batches of the evaluation's size, for the re-estimation of BatchNorm's statistics."""
    settings = config.dsaux
    size = min(settings.run.eval_batch_size, len(dataset.train_labels) // launch.replicas)
    return ReplicaStream(
        dataset,
        loader=settings.data.loader,
        seed=settings.run.seed + BATCHNORM_STREAM_SEED_OFFSET,
        replica=replica,
        num_replicas=launch.replicas,
        micro_batch_size=size,
        micro_batches_per_step=1,
        device=device,
        workers=settings.data.workers,
        augment=settings.data.augment,
    )


def _build_aux_net(
    config: Config, layers: list[Layer], *, shape: tuple[int, int, int], bounds: tuple[int, ...]
) -> AuxNet | None:
    settings = config.dsaux
    if settings.pipeline.schedule == "1f1b" or len(bounds) <= 2:
        return None
    after_layer = boundary_shapes(layers, input_shape=shape)
    shapes = [shape, *(after_layer[bound - 1] for bound in bounds[1:-1])]
    return build_aux_net(
        shapes, depth=settings.aux.depth, width=settings.aux.width, segment=settings.aux.segment, seed=settings.run.seed
    )
