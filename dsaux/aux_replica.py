"""One rank's replica of the AuxNet and everything that keeps the replicas equal.

Used by the engine. All ranks hold the same AuxNet. In a step each adds the gradient of the forces it computed; one
all-reduce over all processes sums them over the pipe group and averages them over the data group, and every replica
takes the same optimizer step, so the replicas stay bit-identical. The same message carries the handful of numbers that
all ranks want to know, so that a step needs no second collective:

    [ AuxNet's gradients | variance of each boundary | mismatch of each boundary | loss | batch digest of each rank ]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from dsaux.models.auxnet import AuxNet
from dsaux.objective import updated_variance


@dataclass(frozen=True)
class TickReport:
    """What all ranks know after a step.

    Attributes:
        loss: loss of the last stage, mean over the global batch; scalar.
        mismatch: relative mismatch per boundary, mean over micro-batches and replicas; shape (K-1,).
        digests: batch digest per global rank, 0 where none was contributed; shape (world size,).
    """

    loss: Tensor
    mismatch: Tensor
    digests: Tensor


class AuxReplica:
    """The AuxNet of this rank, its optimizer and learning-rate schedule, and the one message of a step.

    Args:
        net: the AuxNet, already on its device; None when there is no boundary (K = 1).
        num_boundaries: K - 1.
        num_replicas: number of data-parallel replicas R.
        rank: global rank.
        world_size: K * R.
        group: process group of all ranks.
        make_optimizer: builds the optimizer for a list of parameters.
        make_scheduler: builds the learning-rate schedule for that optimizer, or gives None.
        clip_norm: largest norm of the summed gradient; 0 switches clipping off.
        device: where the message lives.
        dtype: precision of the message (float32, or float64 for a float64 AuxNet).
    """

    def __init__(
        self,
        net: AuxNet | None,
        num_boundaries: int,
        *,
        num_replicas: int,
        rank: int,
        world_size: int,
        group: Any,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any],
        clip_norm: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.net = net
        self.num_replicas, self.rank, self.world_size = num_replicas, rank, world_size
        self.group, self.clip_norm = group, clip_norm
        self.parameters: list[Tensor] = [] if net is None else [p for p in net.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters) if self.parameters else None
        self.scheduler = None if self.optimizer is None else make_scheduler(self.optimizer)
        self.variance = torch.full((num_boundaries,), float("nan"), device=device, dtype=dtype)
        """Running variance of each boundary's auxiliary variable; NaN until the first step has ended."""

        num_weights = sum(parameter.numel() for parameter in self.parameters)
        self._message = torch.zeros(num_weights + 2 * num_boundaries + 1 + world_size, device=device, dtype=dtype)
        lengths = [num_weights, num_boundaries, num_boundaries, 1, world_size]
        parts = torch.split(self._message, lengths)  # views: writing to a part writes to the message
        self._gradients, self._variances, self._mismatches, self._loss, self._digests = parts
        self._work: Any = None
        self._share_gradients()
        self._broadcast_weights()

    def begin(self) -> None:
        """Clear the message for a new step."""
        self._message.zero_()
        self._share_gradients()

    def add_boundary(self, boundary: int, *, variance: Tensor, mismatch: Tensor, weight: float) -> None:
        """Add one micro-batch's variance and mismatch of a boundary; `weight` is 1 / micro-batches."""
        self._variances[boundary] += weight * variance
        self._mismatches[boundary] += weight * mismatch

    def add_loss(self, loss: Tensor, *, weight: float) -> None:
        """Add one micro-batch's loss of the last stage; `weight` is 1 / micro-batches."""
        self._loss += weight * loss.detach()

    def add_digest(self, digest: int) -> None:
        """Add the digest of the batch that this rank saw, below 2**24 so that float32 holds it exactly."""
        self._digests[self.rank] = digest

    def start_sum(self) -> None:
        """Start the all-reduce over all ranks; pairs with :meth:`finish_sum`, which waits for it."""
        if self.world_size > 1:
            self._work = dist.all_reduce(self._message, group=self.group, async_op=True)

    def finish_sum(self) -> TickReport:
        """Wait for the sum, refresh the running variances and return what it brought."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        digests = self._digests.clone()
        if self.num_replicas > 1:
            self._message.div_(self.num_replicas)
        if self.net is not None:
            self.variance = updated_variance(self.variance, self._variances)
        return TickReport(loss=self._loss[0].clone(), mismatch=self._mismatches.clone(), digests=digests)

    def step(self) -> None:
        """Clip and take the optimizer's step on the summed gradients; the same on every rank."""
        if self.optimizer is None:
            return
        if self.clip_norm > 0:
            norm = torch.linalg.vector_norm(self._gradients)
            self._gradients.mul_((self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule and running variances; the weights are saved with the module."""
        return {
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "variance": self.variance.detach().cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.variance.copy_(state["variance"])

    def _share_gradients(self) -> None:
        # Autograd adds into `.grad` in place, that is straight into the message: no copy before or after the sum.
        offset = 0
        for parameter in self.parameters:
            view = self._gradients[offset : offset + parameter.numel()].view_as(parameter)
            if parameter.grad is None or parameter.grad.data_ptr() != view.data_ptr():
                parameter.grad = view
            offset += parameter.numel()

    def _broadcast_weights(self) -> None:
        # Replicas are built from one seed; libraries of two versions could still draw two sets of weights.
        if self.world_size > 1:
            for parameter in self.parameters:
                dist.broadcast(parameter.data, src=0, group=self.group)
