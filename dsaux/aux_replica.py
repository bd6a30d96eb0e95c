"""One rank's replica of the AuxNet and everything that keeps the replicas equal.

Used by the engine. All ranks hold the same AuxNet. In a tick each adds the gradient of the forces it computed; one
all-reduce over all processes sums them over the pipe group and averages them over the data group, and every replica
takes the same optimizer step, so the replicas stay bit-identical. The same message carries the handful of numbers that
all ranks want to know, so that a tick needs no second collective:

    [ AuxNet's gradients | variance, mismatch, adjoint of each boundary | loss | batch digest of each rank | flags ]

There are two such messages: one is filled while the other is under way, so that a sum may run under the next tick.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from dsaux.models.auxnet import AuxNet
from dsaux.objective import updated_variance
from dsaux.optim_state import (
    cycles_momentum,
    group_settings,
    load_group_settings,
    load_parameter_states,
    parameter_states,
)
from dsaux.transfers import WaitMeter
from dsaux.wavefront import Tick


@dataclass(frozen=True)
class TickReport:
    """What all ranks know when the sum of a tick has come.

    Attributes:
        tick: which batches the stages treated.
        loss: loss of the last stage, mean over the global batch; scalar, 0 where that stage had no batch.
        mismatch: relative mismatch per boundary, mean over micro-batches and replicas; shape (K-1,).
        adjoint: norm of the adjoint over that of the coupling force per boundary, mean likewise; shape (K-1,).
        digests: batch digest per global rank, 0 where none was contributed; shape (world size,).
        flags: what all ranks must agree on (`dsaux.step_guard`), summed over all ranks; shape (1 + K,).
        has_boundary: boundaries whose lower stage had a batch; the others hold zeros; shape (K-1,).
    """

    tick: Tick
    loss: Tensor
    mismatch: Tensor
    adjoint: Tensor
    digests: Tensor
    flags: Tensor
    has_boundary: Tensor


class Message:
    """One buffer and the parts of it, which are views: writing to a part writes to the message."""

    def __init__(
        self,
        parameters: list[Tensor],
        num_boundaries: int,
        world_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        lengths = [sum(sizes), num_boundaries, num_boundaries, num_boundaries, 1, world_size, num_boundaries + 2]
        self.data = torch.zeros(sum(lengths), device=device, dtype=dtype)
        parts = torch.split(self.data, lengths)
        self.gradients, self.variances, self.mismatches, self.adjoints, self.loss, self.digests, self.flags = parts
        views = zip(torch.split(self.gradients, sizes), parameters, strict=True) if parameters else ()
        self.views = [_view_like(part, parameter) for part, parameter in views]

    def in_order(self) -> Tensor:
        """The message with the gradients in the order of their indices, whatever the parameters' memory format."""
        return torch.cat([*(view.reshape(-1) for view in self.views), self.data[self.gradients.numel() :]])

    def load(self, data: Tensor) -> None:
        """Take what :meth:`in_order` gave."""
        self.data.copy_(data)
        parts = torch.split(data[: self.gradients.numel()], [view.numel() for view in self.views])
        for view, part in zip(self.views, parts if self.views else (), strict=True):
            view.copy_(part.view(view.shape))


def _view_like(part: Tensor, parameter: Tensor) -> Tensor:
    """A part of a message as a gradient: autograd adds in place only into one of the parameter's own strides."""
    if parameter.is_contiguous():
        return part.view_as(parameter)
    return part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())


class AuxReplica:
    """The AuxNet of this rank, its optimizer and learning-rate schedule, and the one message of a tick.

    Attributes:
        run: the AuxNet's forward pass, as it is called; compiled where the run asks for it.

    Args:
        net: the AuxNet, already on its device; None where there is none (K = 1, or a schedule without one): the message
            then has the other figures alone.
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
        meter: counts the time that is lost in the wait for the sum.
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
        meter: WaitMeter,
    ) -> None:
        self.net = net
        self.run: Callable[..., list[Tensor]] | None = net
        self.num_replicas, self.rank, self.world_size = num_replicas, rank, world_size
        self.group, self.clip_norm, self.meter = group, clip_norm, meter
        self.parameters: list[Tensor] = [] if net is None else [p for p in net.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters) if self.parameters else None
        self.scheduler = None if self.optimizer is None else make_scheduler(self.optimizer)
        self.variance = torch.full((num_boundaries,), float("nan"), device=device, dtype=dtype)
        """Running variance of each boundary's auxiliary variable; NaN until the first step has ended."""
        self._has_variance = [False] * num_boundaries
        self._masks: dict[tuple[bool, ...], Tensor] = {}

        self._num_boundaries = num_boundaries
        self._filled, self._summed = self.new_message(), self.new_message()
        self._work: Any = None
        self._tick = Tick(())
        self._share_gradients(self._filled)
        self._broadcast_weights()

    def begin(self) -> None:
        """Clear the message for a new tick."""
        self._filled.data.zero_()
        self._share_gradients(self._filled)

    def new_message(self) -> Message:
        """An empty message of this replica's own form."""
        device, dtype = self.variance.device, self.variance.dtype
        return Message(self.parameters, self._num_boundaries, self.world_size, device=device, dtype=dtype)

    @contextlib.contextmanager
    def filling(self, message: Message) -> Iterator[None]:
        """Within the block everything that is added goes into `message`, AuxNet gradients included."""
        own, self._filled = self._filled, message
        self._share_gradients(message)
        try:
            yield
        finally:
            self._filled = own
            self._share_gradients(own)

    def take(self, message: Message) -> None:
        """Let a message that was filled elsewhere be the one of this tick, to which nothing was added yet."""
        self._filled.data.copy_(message.data)

    def has_variance(self, boundary: int) -> bool:
        """Whether a boundary has a running variance; once true it stays so."""
        return self._has_variance[boundary]

    def _look_for_variances(self) -> None:
        self._has_variance = (~self.variance.isnan()).tolist()

    def add_boundary(
        self, boundary: int, *, variance: Tensor, mismatch: Tensor, adjoint: Tensor | float, weight: float
    ) -> None:
        """Add one micro-batch's figures of a boundary; `weight` is 1 / micro-batches."""
        self._filled.variances[boundary] += weight * variance
        self._filled.mismatches[boundary] += weight * mismatch
        self._filled.adjoints[boundary] += weight * adjoint

    def add_loss(self, loss: Tensor, *, weight: float) -> None:
        """Add one micro-batch's loss of the last stage; `weight` is 1 / micro-batches."""
        self._filled.loss += weight * loss.detach()

    def add_digest(self, digest: int) -> None:
        """Add the digest of the batch that this rank saw, below 2**24 so that float32 holds it exactly."""
        self._filled.digests[self.rank] = digest

    def add_flags(self, flags: Tensor) -> None:
        """Add this rank's flags, shape (1 + K,)."""
        self._filled.flags += flags

    @property
    def own_gradients(self) -> Tensor:
        """What this rank adds to the AuxNet's gradients in the present tick; one dimension."""
        return self._filled.gradients

    @property
    def newest_flags(self) -> Tensor:
        """Flags of the sum that was started last: summed behind :meth:`settle`, over R once it is finished."""
        return self._summed.flags

    def start_sum(self, tick: Tick) -> None:
        """Start the all-reduce over all ranks; pairs with :meth:`finish_sum`, which waits for it.

        What is added from now on goes into the other message.

        Args:
            tick: which batches the stages have treated, the same on every rank.
        """
        assert self._work is None, "the sum before has not been awaited"
        self._filled, self._summed, self._tick = self._summed, self._filled, tick
        if self.world_size > 1:
            self._work = dist.all_reduce(self._summed.data, group=self.group, async_op=True)
        self.begin()

    def finish_sum(self, *, keep_variance: bool = False) -> TickReport:
        """Wait for the sum, refresh the running variances and return what it brought.

        Args:
            keep_variance: leave the variances as they are where a rank saw something that is no number.
        """
        if self._work is not None:
            self.meter.wait(self._work)
            self._work = None
        message = self._summed
        digests, flags = message.digests.clone(), message.flags.clone()
        if self.num_replicas > 1:
            message.data.div_(self.num_replicas)
        has_boundary = self._boundaries_of(self._tick)
        if self.net is not None:
            updated = updated_variance(self.variance, message.variances)
            is_fresh = has_boundary & (flags[1:].sum() == 0) if keep_variance else has_boundary
            # In place: a captured tick reads it where it was at its capture.
            self.variance.copy_(torch.where(is_fresh, updated, self.variance))
            if not all(self._has_variance):  # only then: the host waits for the device
                self._look_for_variances()
        return TickReport(
            tick=self._tick,
            loss=message.loss[0].clone(),
            mismatch=message.mismatches.clone(),
            adjoint=message.adjoints.clone(),
            digests=digests,
            flags=flags,
            has_boundary=has_boundary,
        )

    def _boundaries_of(self, tick: Tick) -> Tensor:
        """`TickReport.has_boundary`; kept on the device, since the host would wait for it to hand over a new one."""
        has_batch = tuple(step is not None for step in tick.steps[:-1])
        if has_batch not in self._masks:  # while the wavefront fills and drains, and once between
            self._masks[has_batch] = torch.tensor(has_batch, dtype=torch.bool, device=self.variance.device)
        return self._masks[has_batch]

    def step(self, *, skip: bool = False) -> None:
        """Clip and take the optimizer's step on the summed gradients; the same on every rank.

        The learning rate follows the batches that enter: it rests in the ticks that drain the wavefront.

        Args:
            skip: leave the weights as they are; the learning rate goes on.
        """
        if self.optimizer is None:
            return
        if not skip:
            if self.clip_norm > 0:
                norm = torch.linalg.vector_norm(self._summed.gradients)
                self._summed.gradients.mul_((self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            self._share_gradients(self._summed)
            self.optimizer.step()
            self._share_gradients(self._filled)
        if self.scheduler is not None and self._tick.has_loss:
            self.scheduler.step()

    def settle(self) -> None:
        """Wait for the sum under way; :meth:`finish_sum` finds it there."""
        if self._work is not None:
            self.meter.wait(self._work)
            self._work = None

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state by parameter, schedule, running variances, and the sum that the next step takes.

        The weights are saved beside it. A sum under way is waited for.
        """
        self.settle()
        names = [] if self.net is None else [name for name, p in self.net.named_parameters() if p.requires_grad]
        states = [] if self.optimizer is None else parameter_states(self.optimizer, self.parameters)
        return {
            "optimizer": dict(zip(names, states, strict=True)),
            "groups": [] if self.optimizer is None else group_settings(self.optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "variance": self.variance.detach().cpu().clone(),
            "sum": self._summed.in_order().detach().cpu(),
            "sum_steps": list(self._tick.steps),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], *, renamed: Mapping[str, str], boundaries: Sequence[int | None]
    ) -> None:
        """Restore what :meth:`state_dict` gave, or the part of it whose segments are still there.

        Args:
            state: what it gave.
            renamed: prefixes of parameter names, as they were and as they are; other parameters start anew.
            boundaries: for each boundary the number that it had, None for a new one.
        """
        self._restore_optimizer(state, renamed)
        if self.optimizer is not None and self.scheduler is not None and state["scheduler"] is not None:
            load_group_settings(self.optimizer, state["groups"], with_momentum=cycles_momentum(self.scheduler))
            self.scheduler.load_state_dict(state["scheduler"])
        for new, old in enumerate(boundaries):
            if old is not None:
                self.variance[new] = state["variance"][old]
        self._look_for_variances()
        if state["sum"].shape == self._summed.data.shape:
            self._summed.load(state["sum"].to(self._summed.data))
            self._tick = Tick(tuple(state["sum_steps"]))

    def _restore_optimizer(self, state: Mapping[str, Any], renamed: Mapping[str, str]) -> None:
        if self.optimizer is None or self.net is None:
            return
        saved = {
            new + name.removeprefix(old): entry
            for name, entry in state["optimizer"].items()
            for old, new in renamed.items()
            if name.startswith(old)
        }
        names = [name for name, parameter in self.net.named_parameters() if parameter.requires_grad]
        load_parameter_states(self.optimizer, self.parameters, [saved.get(name) for name in names])

    def _share_gradients(self, message: Message) -> None:
        # Autograd adds into `.grad` in place, that is straight into the message: no copy before or after the sum.
        for parameter, view in zip(self.parameters, message.views, strict=True):
            parameter.grad = view

    def _broadcast_weights(self) -> None:
        # Replicas are built from one seed; libraries of two versions could still draw two sets of weights.
        if self.world_size > 1:
            for parameter in self.parameters:
                dist.broadcast(parameter.data, src=0, group=self.group)
