"""From a checked configuration to an engine: cut the network, build the stage and the AuxNet, initialize DeepSpeed.

train.py calls these one after the other, when the process group stands.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.bootstrap import initialize
from dsaux.checkpoint import FoundCheckpoint
from dsaux.config import Config, Launch, has_aux_net, resolved_deepspeed
from dsaux.data import Dataset, ReplicaStream, test_batches
from dsaux.engine import AuxPipelineEngine
from dsaux.engine_state import content_bounds
from dsaux.models import Layer, boundary_specs
from dsaux.models.auxnet import AuxNet, build_aux_net
from dsaux.models.causality import run_layers
from dsaux.models.local_heads import build_local_heads
from dsaux.models.seeding import derived_seed
from dsaux.models.shapes import SampleSpec
from dsaux.module import AuxPipelineModule
from dsaux.partition import Partition, choose_bounds
from dsaux.placement import topology_of

if TYPE_CHECKING:
    from dsaux.data.node_share import NodeGroup
    from dsaux.data.stream import TestBatches

T = TypeVar("T")
BATCHNORM_STREAM_SEED_OFFSET = 1_000_003
"""Added to the run's seed for the batches that re-estimate BatchNorm: another order than the training's own."""


def agree_on_partition(
    config: Config,
    launch: Launch,
    *,
    layers: list[Layer],
    dataset: Dataset,
    device: torch.device,
    found: FoundCheckpoint | None,
) -> Partition:
    """Cut the layers into stages on rank 0 (it may measure times) and tell all ranks.

    Args:
        config: the checked configuration.
        launch: processes and batch sizes.
        layers: the whole network.
        dataset: for what a sample is.
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
            input_spec=dataset.input_spec,
            aux_depth=settings.aux.depth,
            aux_width=settings.aux.width,
            aux_segment=settings.aux.segment,
            micro_batch_size=launch.micro_batch_size,
            device=device,
            with_aux=has_aux_net(settings),
            with_heads=settings.pipeline.schedule == "local",
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
    dataset: Dataset,
    partition: Partition,
    main_steps: int,
) -> AuxPipelineEngine:
    """Build this rank's stage, the AuxNet or the local heads, and the engine.

    Args:
        config: the checked configuration.
        launch: processes, stages, replicas and batch sizes.
        layers: the whole network.
        dataset: for what a sample is.
        partition: the bounds that all ranks agreed on.
        main_steps: optimizer steps that the configured learning-rate schedule spans.

    Returns:
        The engine.
    """
    module = AuxPipelineModule(
        layers,
        num_stages=launch.stages,
        topology=topology_of(config.dsaux.pipeline.placement, stages=launch.stages, replicas=launch.replicas),
        bounds=partition.bounds,
        loss_fn=training_loss(config),
        aux_net=build_aux_net_of(config, layers, input_spec=dataset.input_spec, bounds=partition.bounds),
        local_heads=build_local_heads_of(config, layers, input_spec=dataset.input_spec, bounds=partition.bounds),
        seed=config.dsaux.run.seed,
    )
    document = resolved_deepspeed(config, launch, total_steps=main_steps)
    engine, _, _, _ = initialize(model=module, config=document)
    # From here on PyTorch's generator serves dropout alone: other draws on each rank, the same in the next run.
    torch.manual_seed(derived_seed(config.dsaux.run.seed, "rank", torch.distributed.get_rank()))
    return engine


def training_loss(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of the last stage, under `local` of every stage: `loss(scores, labels) -> scalar`, the batch's mean."""
    return functools.partial(cross_entropy, label_smoothing=config.dsaux.run.label_smoothing)


def cross_entropy(outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of scores (B, classes) or (B, T, classes), computed in float32 at least.

    Args:
        outputs: the scores.
        labels: int64, shape (B,) or (B, T).
        label_smoothing: share of the label's weight that is spread over all classes.
    """
    outputs, labels = outputs.flatten(0, -2), labels.flatten()
    scores = outputs if outputs.dtype == torch.float64 else outputs.float()
    return F.cross_entropy(scores, labels, label_smoothing=label_smoothing)


def network_layers(config: Config, dataset: Dataset) -> list[Layer]:
    """The configured network for this data set's classes, as a list of named layers."""
    return run_layers(config.dsaux, num_classes=dataset.num_classes, input_spec=dataset.input_spec)


def node_group(config: Config, launch: Launch, *, replica: int, stage: int) -> NodeGroup | None:
    """The ranks of this replica on this host, where one of them makes the batches for all; a collective call.

    Args:
        config: the checked configuration.
        launch: processes, stages and batch sizes.
        replica: of this rank.
        stage: of this rank; the last one of a host makes the batches: under `al` it reads first. Under `local`
            it reads last, and the batches are made ahead for the first.
    """
    if config.dsaux.data.decode != "once_per_node":
        return None
    from dsaux.data.node_share import NodeGroup

    own = (socket.gethostname(), replica)
    stages = {rank: (place, number) for rank, (place, number) in enumerate(gather_all((own, stage)))}
    ranks = sorted((rank for rank, (place, _) in stages.items() if place == own), key=lambda rank: stages[rank][1])
    return NodeGroup(
        ranks=tuple(ranks),
        rank=torch.distributed.get_rank(),
        num_slots=launch.stages * launch.gradient_accumulation_steps + 2,
        timeout_s=config.dsaux.run.timeout_s,
        exchange=gather_all,
    )


def gather_all(value: T) -> list[T]:
    """What every rank gives, in the order of the ranks; a collective call of all ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def training_stream(
    config: Config,
    launch: Launch,
    *,
    dataset: Dataset,
    replica: int,
    device: torch.device,
    share: NodeGroup | None = None,
) -> ReplicaStream:
    """The endless stream of training micro-batches of one replica.

    Args:
        config: the checked configuration.
        launch: replicas and batch sizes.
        dataset: what to train on.
        replica: which replica.
        device: where the batches are put.
        share: from `node_group`.
    """
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
        share=share,
    )


def batchnorm_stream(
    config: Config, launch: Launch, *, dataset: Dataset, replica: int, device: torch.device
) -> ReplicaStream:
    """Training images in batches of the evaluation's size, for the re-estimation of BatchNorm's statistics."""
    settings = config.dsaux
    size = min(settings.run.eval_batch_size, dataset.num_train // launch.replicas)
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


def evaluation_batches(
    config: Config, launch: Launch, *, dataset: Dataset, replica: int, device: torch.device
) -> TestBatches:
    """One replica's share of the test set; can be iterated once for every evaluation."""
    settings = config.dsaux
    return test_batches(
        dataset,
        loader=settings.data.loader,
        replica=replica,
        num_replicas=launch.replicas,
        batch_size=settings.run.eval_batch_size,
        device=device,
        workers=settings.data.workers,
    )


def build_aux_net_of(
    config: Config, layers: list[Layer], *, input_spec: SampleSpec, bounds: Sequence[int]
) -> AuxNet | None:
    """The AuxNet that the configuration asks for; None where its schedule needs none.

    Args:
        config: the checked configuration.
        layers: the whole network.
        input_spec: one sample of the data.
        bounds: K+1 layer indices.
    """
    settings = config.dsaux
    if not has_aux_net(settings) or len(bounds) <= 2:
        return None
    after_layer = boundary_specs(layers, input_spec=input_spec)
    specs = [input_spec, *(after_layer[bound - 1] for bound in bounds[1:-1])]
    return build_aux_net(
        specs, depth=settings.aux.depth, width=settings.aux.width, segment=settings.aux.segment, seed=settings.run.seed
    )


def build_local_heads_of(
    config: Config, layers: list[Layer], *, input_spec: SampleSpec, bounds: Sequence[int]
) -> list[nn.Module] | None:
    """The heads of all boundaries, the same on every rank; None where the schedule needs none.

    Args:
        config: the checked configuration.
        layers: the whole network.
        input_spec: one sample of the data.
        bounds: K+1 layer indices.
    """
    if config.dsaux.pipeline.schedule != "local":
        return None
    after_layer = boundary_specs(layers, input_spec=input_spec)
    specs = [after_layer[bound - 1] for bound in bounds[1:-1]]
    return build_local_heads(specs, scores=after_layer[-1], seed=config.dsaux.run.seed)
