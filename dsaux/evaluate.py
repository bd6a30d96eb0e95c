"""Evaluation of the real chain F_(K-1) o .. o F_0. Called by the trainer between epochs, and by `--eval_only`.

The AuxNet takes no part. A stage's BatchNorm statistics were gathered on inputs made by the AuxNet, so they are
re-estimated first, by a few training batches sent forward through the real chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dsaux.engine import AuxPipelineEngine

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Figures over the whole test set.

    Attributes:
        top1: share of labels that have the highest score.
        top5: share of labels that are among the five highest scores (all classes, where there are fewer).
        loss: mean cross-entropy.
        samples: number of test labels: one per image, or one per token of text.
    """

    top1: float
    top5: float
    loss: float
    samples: int


def evaluate(engine: AuxPipelineEngine, batches: Batches, *, num_batches: int) -> Evaluation:
    """Evaluate the network over all stages; every rank calls it and gets the same figures.

    Args:
        engine: the engine; its module is left in training mode.
        batches: (inputs, labels) of this replica's share of the test set, one shape; labels below 0 are padding.
        num_batches: number of batches, equal on every rank.

    Returns:
        Figures over the test sets of all replicas together.

    Raises:
        RuntimeError: if there was no labelled sample at all.
    """
    engine.module.eval()
    sums = engine.forward_chain(batches, classification_sums, num_micro_batches=num_batches)
    engine.module.train()
    total = torch.zeros(4, dtype=torch.float64, device=engine.device)
    if sums is not None:
        total += sums
    dist.all_reduce(total, group=engine.module.world_group)
    loss, top1, top5, samples = total.tolist()
    if samples == 0:
        raise RuntimeError("the test set is empty: no batch held a labelled sample.")
    return Evaluation(top1=top1 / samples, top5=top5 / samples, loss=loss / samples, samples=int(samples))


def classification_sums(outputs: Tensor, labels: Tensor) -> Tensor:
    """Sums of cross-entropy, top-1 hits, top-5 hits and labels over one batch, padding left out.

    Args:
        outputs: scores, shape (B, classes), or (B, T, classes) where every token has a label.
        labels: int64, shape (B,) or (B, T); values below 0 mark padding.

    Returns:
        float64 tensor of shape (4,).
    """
    outputs, labels = outputs.flatten(0, -2), labels.flatten()
    real = labels >= 0
    scores = outputs.float() if outputs.dtype != torch.float64 else outputs
    loss = F.cross_entropy(scores, labels.clamp_min(0), reduction="none")
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.unsqueeze(1)
    columns = (loss, best[:, 0], best.any(dim=1), torch.ones_like(loss))
    return torch.stack([(column.double() * real).sum() for column in columns])


def reestimate_batchnorm(engine: AuxPipelineEngine, batches: Batches, *, num_batches: int) -> None:
    """Replace BatchNorm's running statistics by their plain average over batches of the real chain.

    Batches under way are finished before, with the momentum of the training.

    Args:
        engine: the engine; its module is left in training mode.
        batches: (inputs, labels) of training data, this replica's share.
        num_batches: number of batches; 0 keeps the present statistics.
    """
    engine.drain()
    layers = [m for m in engine.module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    count = torch.tensor(len(layers), device=engine.device)
    dist.all_reduce(count, group=engine.module.world_group)
    if num_batches == 0 or count == 0:  # a network without BatchNorm, on all stages: the batches would change nothing
        return
    momenta = [layer.momentum for layer in layers]
    engine.module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's cumulative average
        layer.train()
    engine.forward_chain(batches, _nothing, num_micro_batches=num_batches)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if engine.is_data_parallel:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None, "track_running_stats was asked for above"
                dist.all_reduce(statistic, group=engine.mpu.get_data_parallel_group())
                statistic.div_(engine.dp_world_size)
    engine.module.train()


def _nothing(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.new_zeros(())
